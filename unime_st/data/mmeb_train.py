"""Importer of TIGER-Lab/MMEB-train, the 20 training datasets of MMEB."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
from tqdm.auto import tqdm

from unime_st.data.manifest import begin_stage, finish_stage
from unime_st.data.records import PairRecord, RecordSet, RecordWriter
from unime_st.data.released_judgements import released_item
from unime_st.data.sources import read_rows
from unime_st.data.validation import Candidate, ImageChecker, RejectedWriter, raise_if_empty, write_checked
from unime_st.files import locks_folder

logger = logging.getLogger(__name__)

MMEB_TRAIN_SUBSETS = (
    *("A-OKVQA", "CIRR", "ChartQA", "DocVQA", "HatefulMemes", "ImageNet_1K", "InfographicsVQA", "MSCOCO"),
    *("MSCOCO_i2t", "MSCOCO_t2i", "N24News", "NIGHTS", "OK-VQA", "SUN397", "VOC2007", "VisDial", "Visual7W"),
    *("VisualNews_i2t", "VisualNews_t2i", "WebQA"),
)
"""The 20 in-distribution datasets that both papers train on."""

_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")


@locks_folder("output")
def import_mmeb_train(
    source: str | Path,
    output: str | Path,
    *,
    split: str = "original",
    subsets: Sequence[str] | None = None,
    read_images: bool = True,
    limit: int | None = None,
    workers: int = 4,
    overwrite: bool = False,
) -> RecordSet:
    """Import a local copy of TIGER-Lab/MMEB-train: ``<subset>/<split>-*.parquet`` beside ``images/``.

    Each row gives one pair whose dataset is the subset. Items equal those of the released UniME-V2 files, so that both
    can be joined by item. Image files are referenced, not copied. Invalid rows go to ``rejected.jsonl``.

    Args:
        source: The folder; its ``images_zip`` must be unpacked to ``images``.
        output: Output folder.
        split: Prefix of the Parquet file names: ``"original"`` (default), ``"diverse_instruction"`` or ``"train"``.
        subsets: Names of subsets. Defaults to None, all of :data:`MMEB_TRAIN_SUBSETS` that exist.
        read_images: Decode every image once and identify items by content. False does not read the images; an image
            is then identified by its path. Defaults to True.
        limit: Maximum number of rows per subset. Defaults to None, all.
        workers: Number of decoding threads. Defaults to 4.
        overwrite: Replace an output that was made with other options. Defaults to False.

    Returns:
        RecordSet: The imported pairs.

    Raises:
        FileNotFoundError: If a named subset, or every subset, has no Parquet file of that split.
        ValueError: If a file lacks a column, or no row could be imported.
        StageConflictError: If the output was made with other inputs or options and ``overwrite`` is False.

    Example:
        ::

            from unime_st.data.mmeb_train import import_mmeb_train

            records = import_mmeb_train("MMEB-train", "records/mmeb", subsets=["CIRR", "NIGHTS"])
    """
    source, output = Path(source), Path(output)
    files = _files(source, split, subsets)
    options = {"split": split, "subsets": list(files), "read_images": read_images, "limit": limit}
    inputs = [path for paths in files.values() for path in paths]
    if not begin_stage(output, "import MMEB-train", inputs=inputs, options=options, overwrite=overwrite):
        return RecordSet.load(output)
    with (
        RecordWriter(output, image_root=source) as writer,
        RejectedWriter(output) as rejected,
        ImageChecker(workers) if read_images else nullcontext() as checker,
    ):
        for subset, paths in files.items():
            pairs = islice(_candidates(subset, paths, source, read_images, rejected), limit)
            write_checked(tqdm(pairs, desc=f"importing {subset}", unit="row"), writer, rejected, checker)
    raise_if_empty(writer, rejected, source)
    facts = {"source": str(source), "subsets": list(files), "rejected": rejected.count}
    finish_stage(output, {**writer.counts, **facts})
    return RecordSet.load(output)


def _files(source: Path, split: str, subsets: Sequence[str] | None) -> dict[str, list[Path]]:
    found = {name: sorted((source / name).glob(f"{split}-*.parquet")) for name in subsets or MMEB_TRAIN_SUBSETS}
    missing = [name for name, paths in found.items() if not paths]
    if subsets and missing:
        raise FileNotFoundError(f"{source}: no {split}-*.parquet in {', '.join(missing)}")
    if len(missing) == len(found):
        raise FileNotFoundError(
            f"{source}: no <subset>/{split}-*.parquet; expected a copy of the dataset TIGER-Lab/MMEB-train"
        )
    if missing:
        logger.warning("%s: %d of 20 subsets are missing: %s.", source, len(missing), ", ".join(missing))
    present = {name: paths for name, paths in found.items() if paths}
    for path in (path for paths in present.values() for path in paths):
        if lacking := [name for name in _COLUMNS if name not in pq.read_schema(path).names]:
            raise ValueError(
                f"{path}: missing column {', '.join(lacking)}; MMEB-train files have {', '.join(_COLUMNS)}"
            )
    return present


def _candidates(
    subset: str, paths: Sequence[Path], root: Path, read_images: bool, rejected: RejectedWriter
) -> Iterator[Candidate]:
    for row in (row for path in paths for row in read_rows(path)):
        where = {"file": f"{subset}/{row.file}", "row": row.number}
        values = row.values or {}
        try:
            query, positive = (
                released_item(values[text] or "", values[image] or "", root, read_images)
                for text, image in (_COLUMNS[:2], _COLUMNS[2:])
            )
        except (ValueError, TypeError) as error:
            rejected.add(str(error), **where)
            continue
        yield Candidate(where, PairRecord(query, positive, subset))
