"""Pages of PDF files: rendering, text, queries, rejects, and the retrieval task on them."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import pytest

from unime_st.data.pdf_pages import import_pdf_pages, read_pages
from unime_st.files import read_json

pypdfium2 = pytest.importorskip("pypdfium2")


def _write_pdf(file: Path, pages: list[str]) -> None:
    """A PDF with a line of text on each page; an empty text makes an empty page."""
    document = pypdfium2.PdfDocument.new()
    font = pypdfium2.raw.FPDFText_LoadStandardFont(document, b"Helvetica")
    for text in pages:
        page = document.new_page(200, 100)
        if text:
            line = pypdfium2.raw.FPDFPageObj_CreateTextObj(document, font, 12)
            encoded = (text + "\0").encode("utf-16-le")
            pypdfium2.raw.FPDFText_SetText(line, _wide(encoded))
            pypdfium2.raw.FPDFPageObj_Transform(line, 1, 0, 0, 1, 10, 50)
            pypdfium2.raw.FPDFPage_InsertObject(page, line)
            page.gen_content()
        page.close()
    file.parent.mkdir(parents=True, exist_ok=True)
    document.save(str(file))
    document.close()


def _wide(encoded: bytes):
    return ctypes.cast(ctypes.create_string_buffer(encoded), ctypes.POINTER(ctypes.c_ushort))


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """Two PDF files, one in a folder below, and a file that is none."""
    _write_pdf(tmp_path / "in" / "a.pdf", ["first page about water", "", "third page about bread"])
    _write_pdf(tmp_path / "in" / "sub" / "b.PDF", ["page about stones"])
    (tmp_path / "in" / "broken.pdf").write_bytes(b"%PDF-1.7 cut off")
    return tmp_path / "in"


def test_pages_are_paired_with_their_text(reports: Path, tmp_path: Path) -> None:
    records = import_pdf_pages(reports, tmp_path / "out", dpi=72)
    assert [page.name for page in read_pages(tmp_path / "out")] == [
        "a.pdf#page=1", "a.pdf#page=2", "a.pdf#page=3", "sub/b.PDF#page=1",
    ]  # fmt: skip
    assert [record.query.text for record in records] == [
        "first page about water", "third page about bread", "page about stones",
    ]  # fmt: skip
    assert records[0].positive.image.size() == (200, 100) and records.rows["page"].to_pylist() == [1, 3, 1]
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(row["file"], row.get("page")) for row in rejected] == [("a.pdf", 2), ("broken.pdf", None)]
    assert read_json(tmp_path / "out" / "manifest.json")["pages"] == 4
    assert len(import_pdf_pages(reports, tmp_path / "out", dpi=72)) == 3  # finished: nothing is rendered again


def test_queries_name_file_and_page(reports: Path, tmp_path: Path) -> None:
    rows = [
        {"query": "Where is water?", "file": "a.pdf", "page": 1},
        {"query": "Which page is empty?", "file": "a.pdf", "page": 2},
        {"query": "Beyond?", "file": "a.pdf", "page": 9},
        {"query": "", "file": "a.pdf", "page": 1},
        {"query": "Nowhere?", "file": "a.pdf", "page": "one"},
    ]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = import_pdf_pages(reports, tmp_path / "out", queries=tmp_path / "queries.jsonl", dpi=72)
    assert [record.query.text for record in records] == ["Where is water?", "Which page is empty?"]
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {row.get("row") for row in rejected} == {None, 2, 3, 4}


def test_results_name_file_and_page(reports: Path, tmp_path: Path) -> None:
    from mteb_tasks.records_task import RecordsRetrieval

    (tmp_path / "queries.jsonl").write_text(json.dumps({"query": "Stones?", "file": "sub/b.PDF", "page": 1}))
    import_pdf_pages(reports, tmp_path / "out", queries=tmp_path / "queries.jsonl", dpi=72)
    task = RecordsRetrieval(tmp_path / "out")
    data = task.retrieval_data(task.hf_subsets[0], "test")
    assert list(data.corpus) == [page.name for page in read_pages(tmp_path / "out")]
    assert list(data.relevant.values()) == [{"sub/b.PDF#page=1"}]


def test_no_pdf(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no PDF file"):
        import_pdf_pages(tmp_path, tmp_path / "out")
