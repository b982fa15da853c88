"""One door to the importers: which of them reads a layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from unime_st.data.importing import import_records
from unime_st.data.mmeb_train import import_mmeb_train
from unime_st.data.records import RecordSet
from unime_st.data.released_judgements import import_released


class ImportOptions(Protocol):
    """What :func:`run_import` needs to know, see :class:`unime_st.training.arguments.ImportArguments`."""

    source: str
    output: str
    overwrite: bool
    layout: str
    pairs: list[dict] | None
    image_root: str | None
    embed_images: bool
    split: str
    subsets: list[str] | None
    read_images: bool
    limit: int | None
    workers: int


def run_import(arguments: ImportOptions) -> RecordSet:
    """Import whatever layout the arguments name.

    Args:
        arguments: Options, such as :class:`unime_st.training.arguments.ImportArguments`.

    Returns:
        The records.

    Raises:
        ValueError: If source, output or a needed image root is missing.

    Example:
        >>> import json, pathlib, tempfile
        >>> from unime_st.stages.import_data import run_import
        >>> from unime_st.training.arguments import ImportArguments
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "own.jsonl").write_text(json.dumps({"query": "a fruit", "positive": "melon"}))
        >>> len(run_import(ImportArguments(str(folder / "own.jsonl"), str(folder / "records"))))
        1
    """
    for option in ("source", "output"):
        if not getattr(arguments, option):
            raise ValueError(f"{option} is missing: name it (--{option} PATH).")
    common: dict[str, Any] = {
        "limit": arguments.limit,
        "workers": arguments.workers,
        "overwrite": arguments.overwrite,
    }
    if arguments.layout == "mmeb-train":
        return import_mmeb_train(
            arguments.source,
            arguments.output,
            split=arguments.split,
            subsets=arguments.subsets,
            read_images=arguments.read_images,
            **common,
        )
    if arguments.layout == "released":
        root = arguments.image_root
        if root is None:
            raise ValueError("image_root is missing: name the copy of MMEB-train that holds images/ (--image_root).")
        return import_released(
            arguments.source, arguments.output, image_root=root, read_images=arguments.read_images, **common
        )
    return import_records(
        Path(arguments.source),
        arguments.output,
        pairs=arguments.pairs,
        image_root=arguments.image_root,
        embed_images=arguments.embed_images,
        verify_images=arguments.read_images,
        **common,
    )
