"""Pages of PDF files as images: a record folder with file and page number of every page (extra ``[pdf]``)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from tqdm.auto import tqdm

from unime_st.data.images import MAX_PIXELS
from unime_st.data.items import Item
from unime_st.data.manifest import begin_stage, finish_stage
from unime_st.data.records import PairRecord, RecordSet, RecordWriter
from unime_st.data.sources import read_rows
from unime_st.data.validation import RejectedWriter, raise_if_empty
from unime_st.files import atomic_write, locks_folder

if TYPE_CHECKING:
    import pypdfium2

logger = logging.getLogger(__name__)

PAGES_FILE = "pages.jsonl"
_EXTRA = (pa.field("file", pa.string()), pa.field("page", pa.int32()))
_POINTS_PER_INCH = 72
_WORDS = 256
"""Words of a page's text that its query has at most."""


@dataclass(frozen=True)
class PdfPage:
    """One page of a PDF file.

    Args:
        file: Path of the PDF file below the source folder, with ``/``.
        page: Number of the page, from 1.
        item: Id of its image in the record folder.

    Example:
        >>> PdfPage("reports/2024.pdf", 3, "0" * 32).name
        'reports/2024.pdf#page=3'
    """

    file: str
    page: int
    item: str

    @property
    def name(self) -> str:
        """Address of the page, as PDF viewers take it."""
        return f"{self.file}#page={self.page}"


@locks_folder("output")
def import_pdf_pages(
    source: str | Path,
    output: str | Path,
    *,
    queries: str | Path | None = None,
    dpi: int = 144,
    limit: int | None = None,
    overwrite: bool = False,
) -> RecordSet:
    """Render the pages of PDF files and pair them with queries, or with their own text.

    Args:
        source: A PDF file, or a folder that is searched for PDF files.
        output: Output folder.
        queries: File with the columns query, file and page (from 1); see :func:`~unime_st.data.sources.read_rows`. Each
            row gives a pair. Defaults to None: each page is paired with the text that the PDF holds of it.
        dpi: Resolution in dots per inch. Defaults to 144, about 1190 x 1680 pixels for A4.
        limit: Maximum number of pages. Defaults to None, all.
        overwrite: Replace an output that was made with other options. Defaults to False.

    Returns:
        RecordSet: The pairs, with the additional columns file and page. ``pages.jsonl`` beside them lists all pages, see
        :func:`read_pages`. A PDF that cannot be read, a query about a page that is not there, and without ``queries`` a
        page without text, goes to ``rejected.jsonl`` with the reason.

    Raises:
        FileNotFoundError: If there is no PDF file.
        ImportError: If pypdfium2 is not installed.
        ValueError: If no pair could be imported.
        StageConflictError: If the output was made with other inputs or options and ``overwrite`` is False.

    Example:
        ::

            from unime_st.data.pdf_pages import import_pdf_pages, read_pages

            import_pdf_pages("reports", "runs/pages", queries="questions.jsonl")
            print(read_pages("runs/pages")[0].name)
    """
    source, output = Path(source), Path(output)
    documents = pdf_files(source)
    options = {"dpi": dpi, "limit": limit}
    inputs = [*documents, *([Path(queries)] if queries is not None else [])]
    if not begin_stage(output, "import", inputs=inputs, options=options, overwrite=overwrite):
        return RecordSet.load(output)
    pages: list[PdfPage] = []
    with RecordWriter(output, extra=_EXTRA) as writer, RejectedWriter(output) as rejected:
        asked = None if queries is None else _queries(queries, rejected)
        for page, text, item in render_pages(source, documents, dpi, limit, rejected.add):
            writer.items.add(item)
            pages.append(page)
            where = {"file": page.file, "page": page.page}
            texts = [text] if asked is None else [query.text for query in asked.pop((page.file, page.page), [])]
            for found in filter(None, texts):
                writer.add(PairRecord(Item(found), item, dataset="pdf"), **where)
            if asked is None and not text:
                rejected.add("the page has no text: pair it with a query (--queries)", **where)
        for (file, number), left in (asked or {}).items():
            for query in left:
                rejected.add(f"there is no page {number} of {file!r}", source=query.source, row=query.row)
    raise_if_empty(writer, rejected, source)
    with atomic_write(output / PAGES_FILE) as temporary:
        lines = (json.dumps({"file": page.file, "page": page.page, "item": page.item}) for page in pages)
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    finish_stage(output, {**writer.counts, "source": str(source), "rejected": rejected.count, "pages": len(pages)})
    return RecordSet.load(output)


def pdf_files(source: Path) -> list[Path]:
    """A PDF file, or those in a folder and below it in order of their paths; FileNotFoundError if there is none."""
    if source.is_file():
        return [source]
    found = sorted(file for file in source.rglob("*") if file.suffix.lower() == ".pdf" and file.is_file())
    if not found:
        raise FileNotFoundError(f"{source}: no PDF file, or no such folder")
    return found


def read_pages(folder: str | Path) -> list[PdfPage]:
    """Read which pages a folder made by :func:`import_pdf_pages` holds.

    They come in order of file and page, also those without a query; other record folders have none.
    """
    file = Path(folder) / PAGES_FILE
    if not file.is_file():
        return []
    return [PdfPage(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def render_pages(
    source: Path, documents: list[Path], dpi: int, limit: int | None, reject: Callable[..., None]
) -> Iterator[tuple[PdfPage, str, Item]]:
    """Page, first words and image of every page of PDF files in a folder, or of the only file.

    ``reject`` is called with a reason, ``file`` and ``page`` for each file or page that cannot be read.

    Raises:
        ImportError: If pypdfium2 is not installed.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError("reading PDF files needs pypdfium2: pip install 'unime-st[pdf]'") from error
    bar = tqdm(total=limit, desc=f"rendering {source.name}", unit="page")
    for path in documents:
        file = path.relative_to(source).as_posix() if source.is_dir() else path.name
        try:
            document = pypdfium2.PdfDocument(path)
        except (pypdfium2.PdfiumError, OSError) as error:
            encrypted = "password" in str(error).lower()
            reject(
                "the PDF is encrypted; save a copy without a password"
                if encrypted
                else f"the PDF cannot be read ({error})",
                file=file,
            )
            continue
        try:
            for number in range(1, len(document) + 1):
                if limit is not None and bar.n >= limit:
                    return
                try:
                    text, item = _render(document, number - 1, dpi)
                except (pypdfium2.PdfiumError, ValueError) as error:
                    reject(f"the page cannot be rendered ({error})", file=file, page=number)
                    continue
                bar.update()
                yield PdfPage(file, number, item.id), text, item
        finally:
            document.close()


def _render(document: pypdfium2.PdfDocument, index: int, dpi: int) -> tuple[str, Item]:
    page = document[index]
    try:
        width, height = (round(length * dpi / _POINTS_PER_INCH) for length in page.get_size())
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} is more than {MAX_PIXELS} pixels: lower dpi")
        words = page.get_textpage().get_text_range().split()
        return " ".join(words[:_WORDS]), Item(image=page.render(scale=dpi / _POINTS_PER_INCH).to_pil())
    finally:
        page.close()


@dataclass(frozen=True)
class _Query:
    """A query about a page, and where it was read."""

    text: str
    source: str
    row: int


def _queries(source: str | Path, rejected: RejectedWriter) -> dict[tuple[str, int], list[_Query]]:
    """Queries by file and page number."""
    found: dict[tuple[str, int], list[_Query]] = {}
    for row in read_rows(source):
        try:
            if row.values is None:
                raise ValueError(row.error)
            missing = [name for name in ("query", "file", "page") if row.values.get(name) in (None, "")]
            if missing:
                raise ValueError(f"no value for {', '.join(missing)}; the columns are query, file and page")
            if not str(row.values["page"]).isdecimal():
                raise ValueError(f"page is {row.values['page']!r}, expected the number of a page, from 1")
        except ValueError as error:
            rejected.add(str(error), source=row.file, row=row.number)
            continue
        query = _Query(str(row.values["query"]), row.file, row.number)
        found.setdefault((str(row.values["file"]), int(row.values["page"])), []).append(query)
    return found
