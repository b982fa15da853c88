"""Preflight of MMEB-V2: counts, judgements and pages of local data, checked before anything is encoded."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.mmeb_v2.data_folder import DataFolder
from mteb_tasks.mmeb_v2.page_files import check_pages, encoded_again
from mteb_tasks.mmeb_v2.page_tables import PageTables, read_page_tables
from mteb_tasks.mmeb_v2.visdoc_sets import VisDocSet


def read_set(folder: DataFolder, row: VisDocSet) -> PageTables:
    """Read the tables of a visual-document set.

    Args:
        folder: Where the data lie.
        row: The set.

    Raises:
        MMEBDataError: If the set is missing or faulty; the message names the file and the row.
    """
    tables = folder.tables(row)
    if not tables:
        wanted = folder.root / "annotations" / row.hub / "{queries,corpus,qrels}" / f"{row.split}.parquet"
        raise MMEBDataError(f"{row.key} is missing: expected {wanted} (docs/mmeb_v2.md lists other layouts)")
    return read_page_tables(row, tables)


def check_set(folder: DataFolder, row: VisDocSet) -> str:
    """Check tables and pages of a visual-document set.

    Args:
        folder: Where the data lie.
        row: The set.

    Returns:
        Its sizes, and what differs from the published data or is worth knowing.

    Raises:
        MMEBDataError: If the set is missing or faulty; the message names the file and the row.
    """
    tables = read_set(folder, row)
    check_pages(tables, folder)
    return summary(tables)


def summary(tables: PageTables) -> str:
    """Sum up a visual-document set in a line.

    Args:
        tables: The set.
    """
    row = tables.row
    facts = []
    for name, found, expected in (
        ("queries", len(tables.queries), row.queries),
        ("pages", len(tables.pages), row.pages),
    ):
        published = f" (published: {expected:,})" if expected is not None and found != expected else ""
        facts.append(f"{found:,} {name}{published}")
    facts.append(f"{tables.judgements:,} judgements")
    if row.superseded and any(row.superseded in file.parts for file, _ in tables.corpus_files):
        facts.append(f"may be the faulty older version: put {row.hub} beside it")
    if again := sum(encoded_again(tables, page) for page in tables.pages):
        facts.append(f"{again:,} pages encoded again as JPEG, as the official code does")
    if row.graded and not tables.integer_ids:
        facts.append("page ids are not integers, so ndcg_at_5_official is not defined")
    facts += [f"{count:,} {name}" for name, count in tables.notes.items() if count]
    return f"{row.key}: " + ", ".join(facts)


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
