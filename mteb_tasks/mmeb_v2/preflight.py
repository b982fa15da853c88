"""Preflight of MMEB-V2: counts, judgements and pages of local data, checked before anything is encoded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.mmeb_v2.data_folder import DataFolder
from mteb_tasks.mmeb_v2.page_files import check_pages, encoded_again
from mteb_tasks.mmeb_v2.page_tables import PageTables, read_page_tables
from mteb_tasks.mmeb_v2.visdoc_sets import VisDocSet

ALLOW_MISSING_VARIABLE = "MMEB_ALLOW_MISSING"


@dataclass(frozen=True)
class Checked:
    """What was found of one set.

    Args:
        key: Leaderboard key.
        queries: Number of queries.
        pages: Number of pages.
        judgements: Number of rows of the judgement table.
        notes: What differs from the published data, or is worth knowing.
    """

    key: str
    queries: int
    pages: int
    judgements: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{self.key}: {self.queries:,} queries, {self.pages:,} pages, {self.judgements:,} judgements"
        return "; ".join([head, *self.notes])


def is_missing(folder: DataFolder, row: VisDocSet) -> bool:
    """Whether a set has no tables, also none in an archive.

    Args:
        folder: Where the data lie.
        row: The set.
    """
    return not DataFolder(folder.root, unpack=False).tables(row) and not folder.tables(row)


def read_set(folder: DataFolder, row: VisDocSet) -> PageTables:
    """Read the tables of a set.

    Args:
        folder: Where the data lie.
        row: The set.

    Raises:
        MMEBDataError: If the set is missing or faulty; the message names the file and the row.
    """
    tables = folder.tables(row)
    if not tables:
        wanted = folder.root / "annotations" / row.hub / "{queries,corpus,qrels}" / f"{row.split}.parquet"
        raise MMEBDataError(f"{row.key} is missing: there is no {wanted} (other layouts are in docs/mmeb_v2.md)")
    return read_page_tables(row, tables)


def preflight(folder: DataFolder, rows: Iterable[VisDocSet], *, look: bool = True) -> list[Checked]:
    """Check tables and pages of several sets.

    Args:
        folder: Where the data lie.
        rows: The sets.
        look: Look at every page, too. Defaults to True.

    Returns:
        What was found of each set.

    Raises:
        MMEBDataError: Lists the first fault of each faulty set.
    """
    checked, faults, missing, count = [], [], 0, 0
    for row in rows:
        count += 1
        try:
            missing += is_missing(folder, row)
            tables = read_set(folder, row)
            if look:
                check_pages(tables, folder)
            checked.append(summary(tables))
        except MMEBDataError as error:
            faults.append(str(error))
    if faults:
        hint = f" (set {ALLOW_MISSING_VARIABLE}=1 to leave missing sets out)" if 0 < missing < count else ""
        sets = "1 set" if len(faults) == 1 else f"{len(faults)} sets"
        raise MMEBDataError(f"{sets} of MMEB-V2 cannot be evaluated{hint}:\n" + "\n".join(faults))
    return checked


def summary(tables: PageTables) -> Checked:
    """Sum up one set.

    Args:
        tables: The set.
    """
    row, notes = tables.row, []
    for name, found, expected in (
        ("queries", len(tables.queries), row.queries),
        ("pages", len(tables.pages), row.pages),
    ):
        if expected is not None and found != expected:
            notes.append(f"published: {expected:,} {name}")
    if row.superseded and any(row.superseded in file.parts for file, _ in tables.corpus_files):
        notes.append(f"may be the faulty older version: put {row.hub} beside it")
    if again := sum(encoded_again(tables, page) for page in tables.pages):
        notes.append(f"{again:,} pages are encoded again as JPEG, as the official code does")
    if row.graded and not tables.integer_ids:
        notes.append("page ids are not integers: ndcg_at_5_official is not defined")
    notes += [f"{count:,} {name}" for name, count in tables.notes.items() if count]
    return Checked(row.key, len(tables.queries), len(tables.pages), tables.judgements, tuple(notes))


def options_without_blank(root: Path) -> dict[str, int]:
    """Count answer options of the video question sets whose text the official code cuts to their last character.

    The code takes what follows ``". "``; an option without it, such as ``"A.no blank"``, becomes its last character.

    Args:
        root: Folder of the data.

    Returns:
        Rows with such an option by leaderboard key, for the annotation tables that are there.
    """
    found = {}
    for key, dataset, column in (
        ("Video-MME", "VLM2Vec/Video-MME/default", "options"),
        ("EgoSchema", "VLM2Vec/EgoSchema/Subset", "option"),
    ):
        files = sorted((root / "annotations" / dataset).glob("test*.parquet"))
        if files:
            rows = (row for file in files for row in pq.read_table(file, columns=[column]).column(0).to_pylist())
            found[key] = sum(any(". " not in option for option in row) for row in rows)
    return found
