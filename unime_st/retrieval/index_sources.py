"""Sources of a search index: media folders, tables and record folders as streams of items with ids."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unime_st.data.column_values import as_image, as_text, as_video, is_empty
from unime_st.data.items import Item
from unime_st.data.manifest import is_complete
from unime_st.data.pdf_pages import render_pages
from unime_st.data.records import RecordSet
from unime_st.data.sources import read_rows, source_files
from unime_st.data.videos import VIDEO_SUFFIXES, BadVideoError, NoVideoDecoderError, video_decoder_class

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    ".png .jpg .jpeg .jpe .jfif .gif .bmp .tif .tiff .webp .avif .heic .heif .jp2 .ico .ppm".split()
)
_DPI = 144  # as for import_pdf_pages


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table of items; "" for a column that is not read.

    Args:
        text: Column of the texts. Defaults to "text".
        image: Column of the images: bytes, paths relative to the table, or Image columns of `datasets`. Defaults to
            "image".
        id: Column of the ids; a table without it takes file name and row number. Defaults to "id".
        video: Column of the videos: paths of folders of frames or of video files, or lists of frames. Defaults to
            "video".
    """

    text: str = "text"
    image: str = "image"
    id: str = "id"
    video: str = "video"


def read_items(source: str | Path, columns: Columns | None = None) -> Iterator[tuple[str, Item]]:
    """Stream the items of a source with their ids.

    Args:
        source: A folder of images, video files and PDF files, which is searched with all folders below it (ids are the
            paths below it, and ``file.pdf#page=3`` for a page); one such file; a record folder (its distinct
            positives, by their ids); or a table in a format of :func:`~unime_st.data.sources.read_rows`. Hidden files
            are left out. Files of frames are images: a video that is a folder of frames is a row of a table.
        columns: Columns of a table. Defaults to None, text, image, video and id.

    Yields:
        tuple[str, Item]: Id and item.

    Raises:
        FileNotFoundError: If the source does not exist or contains nothing to index.
        ImportError: If all of the source are PDF files or videos, and pypdfium2 or torchcodec is not installed.
        ValueError: If a row of a table cannot be read.

    Example:
        >>> import pathlib
        >>> from PIL import Image
        >>> from unime_st.retrieval.index_sources import read_items
        >>> pathlib.Path("photos/2024").mkdir(parents=True)
        >>> Image.new("RGB", (8, 8)).save("photos/2024/black.png")
        >>> [name for name, item in read_items("photos")]
        ['2024/black.png']
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if source.is_dir() and is_complete(source):
        records = RecordSet.load(source)
        yield from ((name, records.item(name)) for name in records.positive_ids)
        return
    images, videos, documents = _media_files(source)
    root = source if source.is_dir() else source.parent
    yield from ((path.relative_to(root).as_posix(), Item(image=path)) for path in images)
    if videos:
        try:
            video_decoder_class(videos[0])
            yield from ((path.relative_to(root).as_posix(), Item(video=path)) for path in videos)
        except NoVideoDecoderError as error:
            if not images and not documents:
                raise
            logger.warning("%d videos are left out: %s", len(videos), error)
            videos = []
    if documents:
        yield from _pages(source, documents, skip=bool(images or videos))
    if not (images or videos or documents):
        yield from _table_items(source, columns or Columns())


def _media_files(source: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Images, video files and PDF files of a source, in order of their paths."""
    files = [path for path in sorted(source.rglob("*")) if path.is_file()] if source.is_dir() else [source]
    shown = [path for path in files if not any(part.startswith(".") for part in path.relative_to(source).parts)]
    kinds = (IMAGE_SUFFIXES, VIDEO_SUFFIXES, (".pdf",))
    images, videos, documents = ([path for path in shown if path.suffix.lower() in kind] for kind in kinds)
    return images, videos, documents


def _pages(source: Path, documents: list[Path], *, skip: bool) -> Iterator[tuple[str, Item]]:
    def left_out(reason: str, *, file: str, page: int | None = None) -> None:
        logger.warning("%s is left out: %s", file if page is None else f"{file}#page={page}", reason)

    try:
        for page, _, item in render_pages(source, documents, _DPI, None, left_out):
            yield page.name, item
    except ImportError as error:
        if not skip:
            raise
        logger.warning("%d PDF files are left out: %s", len(documents), error)


def _table_items(source: Path, columns: Columns) -> Iterator[tuple[str, Item]]:
    root = source if source.is_dir() else source.parent
    try:
        files = source_files(source)
    except FileNotFoundError:
        raise FileNotFoundError(f"{source}: contains no image, no video, no PDF file and no table") from None
    for row in (row for file in files for row in read_rows(file)):
        where = f"{row.file}, row {row.number}"
        if row.values is None:
            raise ValueError(f"{where}: {row.error}")
        names = (columns.text, columns.image, columns.video)
        text, image, video = map(row.values.get, names)
        if all(map(is_empty, (text, image, video))):
            raise ValueError(
                f"{where}: no value in the columns {', '.join(map(repr, names))}; found the columns "
                f"{', '.join(row.values)}: name those to index (--text-column, --image-column, --video-column)"
            )
        try:
            item = Item(
                None if is_empty(text) else as_text(text, columns.text),
                None if is_empty(image) else as_image(image, root),
                None if is_empty(video) else as_video(video, root),
            )
        except BadVideoError as error:  # found here, and other bad media when they are read
            logger.warning("%s is left out: %s", where, error)
            continue
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        name = row.values.get(columns.id)
        yield (f"{row.file}:{row.number}" if name is None else str(name)), item
