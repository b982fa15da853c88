"""Read a subset of MMEB and check every row against the table of subsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from mteb_tasks.mmeb.location import ImageFolders, MMEBDataError, parquet_files
from mteb_tasks.mmeb.subsets import IMAGE_TOKEN, Subset

_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")


@dataclass
class SubsetTable:
    """The rows of a subset with each distinct candidate once.

    Args:
        file: First shard, for messages.
        query_texts: Official text of each query.
        query_images: Image path of each query, "" for none.
        document_texts: Official text of each distinct candidate.
        document_images: Image path of each distinct candidate, "" for none.
        candidates: For each query the rows of its candidates; the first one is the positive. Duplicates are kept.
    """

    file: Path
    query_texts: list[str]
    query_images: list[str]
    document_texts: list[str]
    document_images: list[str]
    candidates: list[np.ndarray]


def read_subset(root: Path, subset: Subset) -> SubsetTable:
    """Read and check one subset, without touching a picture.

    Args:
        root: Folder of the evaluation data.
        subset: Which subset.

    Returns:
        Its rows. The field layout of VLM2Vec-V2 (instruction and text apart) is put together to the strings of V1.

    Raises:
        MMEBDataError: If the table is missing, truncated or lacks a column, a candidate list is empty or too long, or
            a text or an image does not fit the subset; the message names file and row.
    """
    files = parquet_files(root, subset.name)
    if not files:
        raise MMEBDataError(f"subset {subset.name} is missing: no {subset.name}/test*.parquet in {root}")
    try:
        table = pa.concat_tables([pq.read_table(file) for file in files])
    except (pa.ArrowInvalid, OSError) as error:
        raise MMEBDataError(f"{files[0]} cannot be read ({error}): download it again") from error
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing or table.num_rows == 0:
        raise MMEBDataError(f"{files[0]}: " + (f"no column {', '.join(missing)}" if missing else "no rows"))
    lengths, texts, images = _candidate_columns(files[0], table)
    document_rows, first = _distinct(texts, images)
    rows_of = np.repeat(np.arange(table.num_rows), lengths)
    document_texts = texts.take(pa.array(first)).to_pylist()
    document_images = images.take(pa.array(first)).to_pylist()
    query_texts = _strings(table["qry_text"])
    query_images = _strings(table["qry_img_path"])
    if "qry_inst" in table.column_names:
        query_texts = _joined_queries(subset, table, query_texts)
        document_texts = _joined_targets(subset, files[0], table, document_texts)
    found = SubsetTable(
        files[0],
        query_texts,
        query_images,
        document_texts,
        document_images,
        np.split(document_rows, np.cumsum(lengths)[:-1]),
    )
    _check(subset, found, rows_of[first], lengths)
    return found


def check_images(subset: Subset, table: SubsetTable, folders: ImageFolders) -> dict[str, Path]:
    """Locate every picture of a subset and look at it as far as its header and end, and the checksums of PNG.

    Args:
        subset: Which subset.
        table: Its rows.
        folders: Where pictures lie.

    Returns:
        Path in the table to file.

    Raises:
        MMEBDataError: If a picture is missing, not a picture, or cut off; the message names the row.
    """
    located: dict[str, Path] = {}
    for side, images in (("query", table.query_images), ("candidate", table.document_images)):
        for number, image in enumerate(images):
            if not image or image in located:
                continue
            file = folders.find(image)
            fault = "is missing" if file is None else _fault(file)
            if file is None or fault is not None:
                row = number
                if side == "candidate":
                    row = next(row for row, listed in enumerate(table.candidates) if number in listed)
                raise MMEBDataError(f"{table.file}: row {row}: picture {image} of the {side} {fault}")
            located[image] = file
    return located


def _fault(file: Path) -> str | None:
    """What is wrong with a picture as far as its header, its end and, of PNG, its checksums tell."""
    from unime_st.data.images import BadImageError, ImageRef

    reference = ImageRef(path=str(file))
    try:
        reference.size()
        if not _ends_properly(file):
            reference.open()  # unusual, but perhaps whole: decoding decides
        with Image.open(file) as opened:
            opened.verify()
    except (BadImageError, OSError, SyntaxError, ValueError) as error:
        return f"is broken: {error}"
    return None


def _ends_properly(file: Path) -> bool:
    """Whether a file ends with the end mark of JPEG or PNG (a cheap test for downloads cut off in the middle)."""
    with file.open("rb") as opened:
        opened.seek(0, 2)
        opened.seek(max(0, opened.tell() - 12))
        tail = opened.read()
    return tail.endswith(b"\xff\xd9") or b"IEND" in tail


def _strings(column: pa.ChunkedArray) -> list[str]:
    return pc.fill_null(column.cast(pa.string()), "").to_pylist()


def _candidate_columns(file: Path, table: pa.Table) -> tuple[np.ndarray, pa.Array, pa.Array]:
    """Number of candidates of each row, and all candidate texts and image paths in row order."""
    columns = {name: table[name].combine_chunks() for name in ("tgt_text", "tgt_img_path")}
    lists = {
        name: pa.types.is_list(column.type) or pa.types.is_large_list(column.type) for name, column in columns.items()
    }
    if not any(lists.values()):  # one candidate per row, not in a list
        lengths = np.ones(table.num_rows, dtype=np.int64)
        flat = [pc.fill_null(column.cast(pa.string()), "") for column in columns.values()]
        return lengths, flat[0], flat[1]
    sizes = {name: pc.fill_null(pc.list_value_length(columns[name]), 0) for name, is_list in lists.items() if is_list}
    lengths = next(iter(sizes.values())).to_numpy(zero_copy_only=False).astype(np.int64)
    for size in sizes.values():
        unequal = np.flatnonzero(size.to_numpy(zero_copy_only=False) != lengths)
        if len(unequal):
            raise MMEBDataError(f"{file}: row {unequal[0]} has not as many candidate texts as candidate images")
    if not lengths.all():
        raise MMEBDataError(f"{file}: row {np.flatnonzero(lengths == 0)[0]} has an empty candidate list")
    flat = []
    for name, column in columns.items():
        # Older rows give one text for all candidates of a row.
        values = (
            column.flatten() if lists[name] else column.take(pa.array(np.repeat(np.arange(table.num_rows), lengths)))
        )
        flat.append(pc.fill_null(values.cast(pa.string()), ""))
    return lengths, flat[0], flat[1]


def _distinct(texts: pa.Array, images: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Number the distinct (text, image) pairs by first appearance.

    Returns:
        The number of each entry, and the position of the first entry of each number.
    """
    codes = [
        pc.dictionary_encode(values).indices.to_numpy(zero_copy_only=False).astype(np.int64)
        for values in (texts, images)
    ]
    keys = codes[0] * (int(codes[1].max()) + 1) + codes[1]
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.arange(len(order))
    return number[inverse], first[order]


def _joined_queries(subset: Subset, table: pa.Table, texts: list[str]) -> list[str]:
    """Queries of VLM2Vec-V2 as the strings of V1."""
    end = "\n\n" if subset.name == "VisDial" else "\n"
    token = f"{IMAGE_TOKEN}\n" if subset.has_image("query") else ""
    return [
        token
        + " ".join(part for part in (instruction.replace(IMAGE_TOKEN, "").strip(), text.strip("\n")) if part)
        + end
        for instruction, text in zip(_strings(table["qry_inst"]), texts)
    ]


def _joined_targets(subset: Subset, file: Path, table: pa.Table, texts: list[str]) -> list[str]:
    """Distinct candidates of VLM2Vec-V2 as the strings of V1."""
    if not subset.has_image("target"):
        return texts
    column = table["tgt_inst"]
    flat = column.combine_chunks().flatten() if pa.types.is_list(column.type) else column
    instructions = {text.replace(IMAGE_TOKEN, "").strip() for text in pc.unique(flat).to_pylist() if text is not None}
    if len(instructions) != 1:
        raise MMEBDataError(f"{file}: {len(instructions)} different target instructions, expected one")
    (instruction,) = instructions
    end = "" if subset.meta == "grounding" and subset.name != "RefCOCO-Matching" else "\n"
    return [
        f"{IMAGE_TOKEN}\n" + " ".join(part for part in (instruction, text.strip()) if part) + end for text in texts
    ]


def _check(subset: Subset, table: SubsetTable, row_of_document: Sequence[int], lengths: np.ndarray) -> None:
    too_many = np.flatnonzero(lengths > subset.candidates)
    if len(too_many):
        raise MMEBDataError(
            f"{table.file}: row {too_many[0]} has {lengths[too_many[0]]} candidates, {subset.name} has at most "
            f"{subset.candidates}"
        )
    sides = (
        ("query", table.query_texts, table.query_images, range(len(table.query_texts))),
        ("target", table.document_texts, table.document_images, row_of_document),
    )
    for side, texts, images, rows in sides:
        instruction = subset.query if side == "query" else subset.target
        for text, image, row in zip(texts, images, rows):
            if bool(image) != subset.has_image(side):
                expected = "an image" if subset.has_image(side) else "no image"
                raise MMEBDataError(f"{table.file}: row {row}: {side} path is {image!r}, expected {expected}")
            if subset.body(side, text) is None:
                raise MMEBDataError(
                    f"{table.file}: row {row}: the {side} text {text[:120]!r} is not an instance of {instruction!r}"
                )
            if not text.strip() and not image:
                raise MMEBDataError(f"{table.file}: row {row}: an empty {side}")
