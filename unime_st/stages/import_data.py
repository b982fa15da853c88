"""Import of training data: JSONL, JSON, CSV, Parquet, `datasets`, MMEB-train, a released judge file or PDF files."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unime_st.data.importing import import_records
from unime_st.data.mmeb_train import import_mmeb_train
from unime_st.data.pdf_pages import import_pdf_pages
from unime_st.data.records import RecordSet
from unime_st.data.released_judgements import import_released
from unime_st.options import OptionError, check_options, option, require_options

logger = logging.getLogger(__name__)


@dataclass
class ImportArguments:
    """Options of :func:`run_import`."""

    source: str = option("", "File or folder to read.", required=True, path="any")
    output: str = option("", "Folder for the records.", required=True)
    overwrite: bool = option(False, "Overwrite the output folder.")
    layout: Literal["own", "mmeb-train", "released", "pdf"] = option(
        "own",
        "Layout of the source: own (JSONL, JSON, CSV, Parquet, datasets), mmeb-train, released (UniME-V2's JSON), "
        "pdf (PDF files).",
    )
    pairs: list[dict[str, Any]] | None = option(
        None, "own: how rows become pairs, in a YAML file; none: by the names of the columns."
    )
    image_root: str | None = option(None, "Folder that image paths are relative to.", path="folder")
    embed_images: bool = option(False, "own: copy image files into the output.")
    split: str = option(
        "original", "mmeb-train: split of the source.", choices=("original", "diverse_instruction", "train")
    )
    subsets: list[str] | None = option(None, "mmeb-train: names of the subsets; none: all 20.")
    queries: str | None = option(
        None, "pdf: file with query, file and page; none: pages are paired with their own text.", path="any"
    )
    dpi: int = option(144, "pdf: resolution of the page images.", unit="dots per inch", at_least=1)
    read_images: bool = option(True, "Decode every image once, to reject bad ones.")
    limit: int | None = option(None, "Rows at most (mmeb-train: of each subset; pdf: pages).", unit="rows", at_least=1)
    workers: int = option(4, "Threads that decode images.", unit="threads", at_least=1)

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)
        if self.layout == "released" and self.image_root is None:
            raise OptionError(
                "image_root is missing: name the copy of MMEB-train that holds images/ (--image_root FOLDER)."
            )


def run_import(args: ImportArguments) -> RecordSet:
    """Import whatever layout the options name.

    Args:
        args: Options.

    Returns:
        The records.

    Raises:
        OptionError: If source, output or a needed image root is missing.

    Example:
        >>> import json, pathlib, tempfile
        >>> from unime_st.stages import ImportArguments, run_import
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "own.jsonl").write_text(json.dumps({"query": "a fruit", "positive": "melon"}))
        >>> len(run_import(ImportArguments(str(folder / "own.jsonl"), str(folder / "records"))))
        1
    """
    require_options(args)
    records = _import(args)
    rejected = int(records.manifest.get("rejected", 0))
    told = f", {rejected:,} rejected (rejected.jsonl says why)" if rejected else ""
    logger.info("import_data: %s pairs in %s%s.", f"{len(records):,}", records.folder, told)
    return records


def _import(args: ImportArguments) -> RecordSet:
    source, output = Path(args.source), Path(args.output)
    limit, workers, overwrite = args.limit, args.workers, args.overwrite
    if args.layout == "mmeb-train":
        return import_mmeb_train(
            source,
            output,
            split=args.split,
            subsets=args.subsets,
            read_images=args.read_images,
            limit=limit,
            workers=workers,
            overwrite=overwrite,
        )
    if args.layout == "pdf":
        return import_pdf_pages(source, output, queries=args.queries, dpi=args.dpi, limit=limit, overwrite=overwrite)
    if args.layout == "released":
        return import_released(
            source,
            output,
            image_root=str(args.image_root),
            read_images=args.read_images,
            limit=limit,
            workers=workers,
            overwrite=overwrite,
        )
    return import_records(
        source,
        output,
        pairs=args.pairs,
        image_root=args.image_root,
        embed_images=args.embed_images,
        verify_images=args.read_images,
        limit=limit,
        workers=workers,
        overwrite=overwrite,
    )
