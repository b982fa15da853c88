"""Reads a visual-document set: queries, page ids and graded judgements, every row checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mteb_tasks.mmeb.location import MMEBDataError, check_shards
from mteb_tasks.mmeb_v2.visdoc_sets import VisDocSet

_QUERY_ID, _PAGE_ID, _TEXT = ("query-id", "_id", "id"), ("corpus-id", "_id", "id"), ("query", "text")
"""Names of columns: those of the BEIR tables, and those of mteb's copies."""
_GRADE = "score"
_STREAM_BUFFER = 1 << 20


@dataclass
class PageTables:
    """A visual-document set without its pages.

    Args:
        row: The set.
        queries: Text by query id.
        pages: Ids of the pages, in corpus order.
        grades: Grade of each relevant page by query id, in the order of the judgements.
        corpus_files: Files of the corpus with their numbers of rows.
        has_images: Whether the corpus table holds the pages.
        integer_ids: Whether page ids are integers, on which the official nDCG of graded sets depends.
        judgements: Rows of the judgement table.
        notes: What a reader of the scores should know, as counts by sentence.
    """

    row: VisDocSet
    queries: dict[str, str]
    pages: list[str]
    grades: dict[str, dict[str, int]]
    corpus_files: list[tuple[Path, int]]
    has_images: bool
    integer_ids: bool
    judgements: int
    notes: Counter[str] = field(default_factory=Counter)

    def where(self, page: int) -> str:
        """Name the file and the row of a page.

        Args:
            page: Position in `pages`.
        """
        return _where(self.corpus_files, page)

    def page_bytes(self) -> Iterator[bytes | None]:
        """Read the encoded pages one after the other; None for a row without one. Holds few of them at a time.

        Raises:
            MMEBDataError: If the table is damaged; names the file and the first row that cannot be read.
        """
        for file, _ in self.corpus_files:
            row = 0
            try:
                with pq.ParquetFile(file, buffer_size=_STREAM_BUFFER, pre_buffer=False) as opened:
                    for batch in opened.iter_batches(batch_size=8, columns=["image"]):
                        for value in batch.column(0).to_pylist():
                            yield value["bytes"] if isinstance(value, dict) else value
                        row += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                raise MMEBDataError(f"{file}: row {row} cannot be read ({error}): download it again") from error


def read_page_tables(row: VisDocSet, tables: dict[str, list[Path]]) -> PageTables:
    """Read and check the tables of a set; no page is touched.

    Args:
        row: The set.
        tables: Files by table, from `mteb_tasks.mmeb_v2.data_folder`.

    Returns:
        The set. Of judgements given twice the higher grade counts; those of 0 or less are dropped.

    Raises:
        MMEBDataError: If a table cannot be read, lacks a column or has no rows, an id is missing or repeated, a grade is
            not an integer, a judgement is about a page that the corpus lacks, or a query has no relevant page; the
            message names the file and the row.
    """
    notes: Counter[str] = Counter()
    query_table, query_files = _read(tables["queries"], (_QUERY_ID, _TEXT))
    queries = dict(zip(_ids(query_table, 0, query_files), _texts(query_table.column(1), query_files)))
    page_table, corpus_files = _read(tables["corpus"], (_PAGE_ID,))
    pages = _ids(page_table, 0, corpus_files)
    qrels, qrels_files = _read(tables["qrels"], (("query-id",), ("corpus-id",), (_GRADE,)))
    grades = _grades(qrels, qrels_files, queries, set(pages), notes)
    for number, query in enumerate(queries):
        if query not in grades:
            raise MMEBDataError(f"{_where(query_files, number)}: query {query!r} has no relevant page")
    if empty := sum(not text.strip() for text in queries.values()):
        notes["queries without a text: the instruction alone is encoded"] = empty
    return PageTables(
        row=row,
        queries=queries,
        pages=pages,
        grades={query: grades[query] for query in queries},
        corpus_files=corpus_files,
        has_images="image" in pq.read_schema(corpus_files[0][0]).names,
        integer_ids=pa.types.is_integer(page_table.schema.field(0).type),
        judgements=qrels.num_rows,
        notes=notes,
    )


def _read(files: Sequence[Path], wanted: Sequence[Sequence[str]]) -> tuple[pa.Table, list[tuple[Path, int]]]:
    """Columns of a table, each under one of its names, and the rows of each file."""
    check_shards(files)
    parts = []
    for file in files:
        try:
            names = pq.read_schema(file).names
            chosen = [next((name for name in options if name in names), None) for options in wanted]
            if None in chosen:
                lacks = wanted[chosen.index(None)][0]
                raise MMEBDataError(f"{file}: no column {lacks!r}, found {', '.join(names)}")
            parts.append(pq.read_table(file, columns=chosen).select(chosen))
        except (pa.ArrowException, OSError) as error:
            raise MMEBDataError(f"{file} cannot be read ({error}): download it again") from error
    try:
        table = pa.concat_tables(parts)
    except pa.ArrowException as error:
        raise MMEBDataError(f"{files[0]} and its other parts have columns of different types ({error})") from error
    if table.num_rows == 0:
        raise MMEBDataError(f"{files[0]} has no rows: download it again")
    return table, [(file, part.num_rows) for file, part in zip(files, parts)]


def _ids(table: pa.Table, column: int, files: Sequence[tuple[Path, int]]) -> list[str]:
    """A column of ids as strings, each of them once."""
    name, values = table.column_names[column], table.column(column).to_pylist()
    seen: set[str] = set()
    for number, value in enumerate(values):
        found = "" if value is None else str(value)
        if not found or found in seen:
            fault = f"{name} {found!r} is there twice" if found else f"no {name}"
            raise MMEBDataError(f"{_where(files, number)}: {fault}")
        seen.add(found)
    return [str(value) for value in values]


def _texts(column: pa.ChunkedArray, files: Sequence[tuple[Path, int]]) -> list[str]:
    values = column.to_pylist()
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise MMEBDataError(f"{_where(files, number)}: the query is {value!r}, expected a text")
    return values


def _grades(
    table: pa.Table, files: Sequence[tuple[Path, int]], queries: dict[str, str], pages: set[str], notes: Counter[str]
) -> dict[str, dict[str, int]]:
    """Positive grades by query and page, in the order in which the pages first appear."""
    found: dict[str, dict[str, int]] = {}
    columns = (table.column(index).to_pylist() for index in range(3))
    for number, (query, page, grade) in enumerate(zip(*columns)):
        if isinstance(grade, bool) or not isinstance(grade, (int, float)) or not float(grade).is_integer():
            raise MMEBDataError(f"{_where(files, number)}: {_GRADE} is {grade!r}, expected an integer")
        query, page, grade = str(query), str(page), int(grade)
        if query not in queries:
            notes["judgements of queries that are not in the table: ignored"] += 1
        elif grade <= 0:
            notes["judgements of 0 or less: dropped"] += 1
        elif page not in pages:
            raise MMEBDataError(f"{_where(files, number)}: page {page!r} is not in the corpus")
        else:
            of_query = found.setdefault(query, {})
            notes["judgements given again: the higher grade counts"] += page in of_query
            of_query[page] = max(grade, of_query.get(page, 0))
    return found


def _where(files: Sequence[tuple[Path, int]], row: int) -> str:
    for file, rows in files:
        if row < rows:
            return f"{file}: row {row}"
        row -= rows
    raise IndexError(row)
