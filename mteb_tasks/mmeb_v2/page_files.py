"""Page images of a visual-document set as files: those of the official layout, or taken out of the corpus table once."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from mteb_tasks.local_data import image_fault, stat_signature
from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.mmeb_v2.data_folder import DataFolder
from mteb_tasks.mmeb_v2.page_tables import PageTables
from unime_st.files import digest, make_once
from unime_st.paths import home

logger = logging.getLogger(__name__)

_AT_ONCE = 64
"""Encoded pages in memory while they are written or checked."""

_THREADS = min(8, os.cpu_count() or 1)


def encoded_again(tables: PageTables, page: str) -> bool:
    """Whether the official code writes a page as a JPEG of its own, so that its pixels are not those of the table."""
    return tables.row.files == "hashed" and page.lower().endswith((".jpg", ".jpeg"))


def page_files(tables: PageTables, folder: DataFolder) -> list[Path]:
    """Find the file of every page; pages that are in the corpus table only are written to the cache once.

    Args:
        tables: The set.
        folder: Where the data lie.

    Returns:
        One file for each page, in corpus order.

    Raises:
        MMEBDataError: If there is no page folder and the table has no pages, or a page is missing or broken; the message
            names the file and the row.
    """
    found = _official_folder(tables, folder)
    if found is not None:
        return _in_folder(tables, found)
    return _extracted(tables)


def check_pages(tables: PageTables, folder: DataFolder) -> None:
    """Check every page as far as its header, its end and, of PNG, its checksums tell; nothing is written.

    Args:
        tables: The set.
        folder: Where the data lie.

    Raises:
        MMEBDataError: As for `page_files`.
    """
    found = _official_folder(tables, folder)
    if found is not None:
        files = _in_folder(tables, found)
        with ThreadPoolExecutor(_THREADS) as pool:
            for number, fault in enumerate(pool.map(image_fault, files)):
                if fault:
                    raise MMEBDataError(f"{tables.where(number)}: page {files[number]} {fault}")
    elif not _cache(tables).is_dir():  # pages in the cache were checked when they were written
        _for_each_page(tables, lambda number, content: None)


def _official_folder(tables: PageTables, folder: DataFolder) -> Path | None:
    found = folder.page_folder(tables.row)
    if found is None and not tables.has_images:
        found = folder.superseded_page_folder(tables.row)
        if found is None:
            wanted = folder.root / "visdoc-tasks" / tables.row.folder
            raise MMEBDataError(f"{tables.corpus_files[0][0]}: no column 'image', and no folder of pages {wanted}")
    return found


def _in_folder(tables: PageTables, folder: Path) -> list[Path]:
    names = set(os.listdir(folder))
    wanted = [tables.row.page_file(page) for page in tables.pages]
    for number, name in enumerate(wanted):
        if name not in names:
            raise MMEBDataError(f"{tables.where(number)}: page {folder / name} is missing")
    return [folder / name for name in wanted]


def _extracted(tables: PageTables) -> list[Path]:
    cache = _cache(tables)

    def write_pages(folder: Path) -> None:
        logger.warning("writing %d pages of %s to %s (once)", len(tables.pages), tables.row.key, cache)

        def write(number: int, content: bytes) -> None:
            as_jpeg = encoded_again(tables, tables.pages[number])
            (folder / _name(number)).write_bytes(official_bytes(content, as_jpeg=as_jpeg))

        _for_each_page(tables, write)

    folder = make_once(cache, write_pages)
    return [folder / _name(number) for number in range(len(tables.pages))]


def official_bytes(content: bytes, *, as_jpeg: bool) -> bytes:
    """Encode a page as the official code stores it.

    Args:
        content: The page as it is in the corpus table.
        as_jpeg: Encode it as JPEG with Pillow's default quality, as the official code does for ids ending in ``.jpg``.

    Returns:
        A file with the pixels that the official code embeds: the same bytes where they need no change.
    """
    with Image.open(io.BytesIO(content)) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        if not turned and not as_jpeg:
            return content
        # The hub's reader turns images by their EXIF orientation before the official code saves them.
        upright = ImageOps.exif_transpose(image) if turned else image
        if as_jpeg and upright.mode not in ("RGB", "L", "CMYK", "1"):
            upright = upright.convert("RGB")  # JPEG has no such mode; the official code fails on these pages
        buffer = io.BytesIO()
        upright.save(buffer, "JPEG" if as_jpeg else "PNG")
        return buffer.getvalue()


def _for_each_page(tables: PageTables, use: Callable[[int, bytes], None]) -> None:
    """Check every page of the corpus table and hand it on, in several threads; few are held in memory."""

    def check_and_use(numbered: tuple[int, bytes | None]) -> None:
        number, content = numbered
        fault: str | None = "has no image"
        if content:
            fault = image_fault(content)
            try:
                if fault is None:
                    return use(number, content)
            except (ValueError, SyntaxError) as error:
                fault = f"is broken: {error}"
        raise MMEBDataError(f"{tables.where(number)}: page {tables.pages[number]!r} {fault}")

    numbered = enumerate(tables.page_bytes())
    with ThreadPoolExecutor(_THREADS) as pool:
        while block := list(islice(numbered, _AT_ONCE)):
            list(pool.map(check_and_use, block))


def _cache(tables: PageTables) -> Path:
    states = [(str(file.resolve()), stat_signature(file.stat())) for file, _ in tables.corpus_files]
    return home() / "mmeb_v2" / "pages" / digest(repr(states), length=16)


def _name(number: int) -> str:
    return f"{number:06d}.page"
