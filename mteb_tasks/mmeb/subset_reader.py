"""Read a subset of MMEB and check every row against the table of subsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mteb_tasks.local_data import image_fault
from mteb_tasks.mmeb.location import ImageFolders, MMEBDataError, check_shards, parquet_files
from mteb_tasks.mmeb.subsets import IMAGE_TOKEN, Subset

_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")


@dataclass
class SubsetTable:
    """The rows of a subset with each distinct candidate once.

    Args:
        shards: Files with their numbers of rows, for messages.
        query_texts: Official text of each query.
        query_images: Image path of each query, "" for none.
        document_texts: Official text of each distinct candidate.
        document_images: Image path of each distinct candidate, "" for none.
        candidates: For each query the rows of its candidates; the first one is the positive. Duplicates are kept.
    """

    shards: list[tuple[Path, int]]
    query_texts: list[str]
    query_images: list[str]
    document_texts: list[str]
    document_images: list[str]
    candidates: list[np.ndarray]

    def location(self, row: int) -> str:
        """Name the file and the row of a query.

        Args:
            row: Its number over all files.
        """
        return _location(self.shards, row)


def read_subset(root: Path, subset: Subset) -> SubsetTable:
    """Read and check one subset, without touching an image.

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
    check_shards(files)
    parts = [read_table(file) for file in files]
    shards = [(file, part.num_rows) for file, part in zip(files, parts)]
    try:
        table = pa.concat_tables(parts, promote_options="permissive")
        lengths, texts, images = _candidate_columns(shards, table)
        query_texts, query_images = (_strings(table[name]) for name in _COLUMNS[:2])
    except pa.ArrowException as error:
        raise MMEBDataError(f"{files[0]}: its columns are not strings and lists of strings ({error})") from error
    document_rows, first = _distinct(texts, images)
    rows_of = np.repeat(np.arange(table.num_rows), lengths)
    document_texts, document_images = texts.at(first), images.at(first)
    if "qry_inst" in table.column_names:
        query_texts = _joined_queries(subset, table, query_texts)
        document_texts = _joined_targets(subset, shards, table, document_texts)
    found = SubsetTable(
        shards,
        query_texts,
        query_images,
        document_texts,
        document_images,
        np.split(document_rows, np.cumsum(lengths)[:-1]),
    )
    _check(subset, found, rows_of[first], lengths)
    return found


def locate_images(table: SubsetTable, folders: ImageFolders, *, look: bool = False) -> dict[str, str]:
    """Locate every image of a subset.

    Args:
        table: The rows of the subset.
        folders: Where images lie.
        look: Look at each, too, as far as its header and end, and the checksums of PNG.

    Returns:
        Path in the table to file.

    Raises:
        MMEBDataError: If an image is missing or, when looked at, is not an image or cut off; the message names the row.
    """
    located: dict[str, str] = {}
    for side, images in (("query", table.query_images), ("candidate", table.document_images)):
        for number, image in enumerate(images):
            if not image or image in located:
                continue
            file = folders.find(image)
            fault = "is missing" if file is None else image_fault(file) if look else None
            if file is None or fault is not None:
                row = number
                if side == "candidate":
                    row = next(row for row, listed in enumerate(table.candidates) if number in listed)
                raise MMEBDataError(f"{table.location(row)}: image {image} of the {side} {fault}")
            located[image] = file
    return located


def read_table(file: Path) -> pa.Table:
    """Read a table, the candidates as codes: a million strings take seconds and a hundred megabytes, codes neither.

    Args:
        file: Parquet file.

    Returns:
        Its rows.

    Raises:
        MMEBDataError: If it cannot be read, has no rows or lacks a column.
    """
    try:
        with pq.ParquetFile(file) as opened:
            paths = [opened.schema.column(number).path for number in range(len(opened.schema))]
        coded = [path for path in paths if path.startswith("tgt_")]
        table = pq.read_table(file, read_dictionary=coded, use_threads=False)  # each thread would keep memory
    except (pa.ArrowException, OSError) as error:
        raise MMEBDataError(f"{file} cannot be read ({error}): download it again") from error
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing or table.num_rows == 0:
        raise MMEBDataError(f"{file}: " + (f"no column {', '.join(missing)}" if missing else "no rows"))
    return table


def _location(shards: Sequence[tuple[Path, int]], row: int) -> str:
    shard = 0
    while row >= shards[shard][1]:
        row -= shards[shard][1]
        shard += 1
    return f"{shards[shard][0]}: row {row}"


def _strings(column: pa.ChunkedArray) -> list[str]:
    return pc.fill_null(column.cast(pa.string()), "").to_pylist()


@dataclass
class _Coded:
    """A column of strings: its distinct strings, and which of them each entry is."""

    strings: list[str]
    codes: np.ndarray

    def at(self, indices: np.ndarray) -> list[str]:
        return [self.strings[code] for code in self.codes[indices]]


def _coded(column: pa.Array) -> _Coded:
    """Codes of a column; what is null is the empty string."""
    encoded = column if pa.types.is_dictionary(column.type) else pc.dictionary_encode(column.cast(pa.string()))
    strings = [*(text or "" for text in encoded.dictionary.to_pylist()), ""]
    number = {text: code for code, text in enumerate(dict.fromkeys(strings))}
    renamed = np.array([number[text] for text in strings], dtype=np.int64)
    indices = encoded.indices
    if indices.null_count:
        indices = pc.fill_null(indices.cast(pa.int64()), len(strings) - 1)
    return _Coded(list(number), renamed[indices.to_numpy(zero_copy_only=False)])


def _candidate_columns(shards: Sequence[tuple[Path, int]], table: pa.Table) -> tuple[np.ndarray, _Coded, _Coded]:
    """Number of candidates of each row, and all candidate texts and image paths in row order."""
    table = table.select(["tgt_text", "tgt_img_path"]).unify_dictionaries().combine_chunks()
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    lists = {
        name: pa.types.is_list(column.type) or pa.types.is_large_list(column.type) for name, column in columns.items()
    }
    if not any(lists.values()):  # one candidate per row, not in a list
        texts, images = (_coded(column) for column in columns.values())
        return np.ones(table.num_rows, dtype=np.int64), texts, images
    sizes = {name: pc.fill_null(pc.list_value_length(columns[name]), 0) for name, is_list in lists.items() if is_list}
    lengths = next(iter(sizes.values())).to_numpy(zero_copy_only=False).astype(np.int64)
    for size in sizes.values():
        unequal = np.flatnonzero(size.to_numpy(zero_copy_only=False) != lengths)
        if len(unequal):
            raise MMEBDataError(f"{_location(shards, unequal[0])} has not as many candidate texts as candidate images")
    if not lengths.all():
        raise MMEBDataError(f"{_location(shards, np.flatnonzero(lengths == 0)[0])} has an empty candidate list")
    found = []
    for name, column in columns.items():
        coded = _coded(column.flatten() if lists[name] else column)
        if not lists[name]:  # older rows give one text for all candidates of a row
            coded.codes = np.repeat(coded.codes, lengths)
        found.append(coded)
    return lengths, found[0], found[1]


def _distinct(texts: _Coded, images: _Coded) -> tuple[np.ndarray, np.ndarray]:
    """Number the distinct (text, image) pairs by first appearance.

    Returns:
        The number of each entry, and the position of the first entry of each number.
    """
    keys = pa.array(texts.codes * len(images.strings) + images.codes)
    numbers = pc.dictionary_encode(keys).indices.to_numpy()
    highest = np.maximum.accumulate(numbers)
    return numbers, np.flatnonzero(np.append(True, highest[1:] > highest[:-1]))


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


def _joined_targets(
    subset: Subset, shards: Sequence[tuple[Path, int]], table: pa.Table, texts: list[str]
) -> list[str]:
    """Distinct candidates of VLM2Vec-V2 as the strings of V1; all candidates of a subset have one instruction."""
    if not subset.has_image("target"):
        return texts
    if "tgt_inst" not in table.column_names:
        raise MMEBDataError(f"{shards[0][0]}: no column tgt_inst")
    column = table.select(["tgt_inst"]).unify_dictionaries().combine_chunks()["tgt_inst"].combine_chunks()
    rows = np.arange(len(column))
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        rows, column = np.repeat(rows, lengths), column.flatten()
    coded = _coded(column)
    instructions = [text.replace(IMAGE_TOKEN, "").strip() for text in coded.strings]
    first = instructions[coded.codes[0]] if len(rows) else ""
    other = np.flatnonzero(np.array([text != first for text in instructions])[coded.codes])
    if len(other):
        found = instructions[coded.codes[other[0]]]
        raise MMEBDataError(f"{_location(shards, rows[other[0]])}: target instruction {found!r}, before {first!r}")
    end = "" if subset.meta == "grounding" and subset.name != "RefCOCO-Matching" else "\n"
    return [f"{IMAGE_TOKEN}\n" + " ".join(part for part in (first, text.strip()) if part) + end for text in texts]


def _check(subset: Subset, table: SubsetTable, row_of_document: Sequence[int], lengths: np.ndarray) -> None:
    too_many = np.flatnonzero(lengths > subset.candidates)
    if len(too_many):
        raise MMEBDataError(
            f"{table.location(too_many[0])} has {lengths[too_many[0]]} candidates, {subset.name} has at most "
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
                raise MMEBDataError(f"{table.location(row)}: {side} path is {image!r}, expected {expected}")
            if subset.body(side, text) is None:
                raise MMEBDataError(
                    f"{table.location(row)}: the {side} text {text[:120]!r} is not an instance of {instruction!r}"
                )
            if not text.strip() and not image:
                raise MMEBDataError(f"{table.location(row)}: an empty {side}")
