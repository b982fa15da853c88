"""Digest of a visual-document set on this machine, so that scores of other data are never taken for those of these."""

from __future__ import annotations

import os
from pathlib import Path

from mteb_tasks.mmeb.content_digest import files_digest
from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.mmeb_v2.data_folder import DataFolder
from mteb_tasks.mmeb_v2.visdoc_sets import VisDocSet
from unime_st.files import digest


def set_digest(root: Path, row: VisDocSet) -> str:
    """Digest of the tables and pages of a set; nothing is unpacked.

    Args:
        root: Folder of the data.
        row: The set.

    Returns:
        12 hexadecimal digits over the files of the set, or over the archives that hold it; ``"missing"`` where there is
        neither.
    """
    try:
        folder = DataFolder(root, unpack=False)
        tables = folder.tables(row)
        files = {f"{name} {file.name}": file for name, found in tables.items() for file in found}
        pages = folder.page_folder(row)
        files |= {name: pages / name for name in sorted(os.listdir(pages))} if pages else {}
        archives = folder.archives() if not tables or not pages else []
    except MMEBDataError:
        return "missing"  # said aloud when the data are needed
    # Each archive for itself: several sets share it, and it is read once.
    parts = [files_digest(files), *(files_digest({archive.name: archive}) for archive in archives)]
    return digest(*parts, length=12) if files or archives else "missing"
