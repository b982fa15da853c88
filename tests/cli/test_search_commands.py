"""`unime index` and `unime search`: sources, output, wrong calls, and the score of an mteb task on the emoji dataset."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.programs import Program, run
from unime_st import Item, UniME
from unime_st.cli import main
from unime_st.data import PairRecord, RecordSet
from unime_st.encoding import VectorShards
from unime_st.retrieval import mine
from unime_st.retrieval.index_sources import Columns, read_items


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photos in folders, a table, an empty folder, and files that are not images."""
    for name, color in (("deep/red.png", "red"), ("blue.jpg", "blue"), (".trash/old.png", "green")):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 60), color).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.json").write_text("not an image")
    rows = [{"id": "one", "text": "a star"}, {"id": "two", "image": "photos/blue.jpg", "text": None}]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "named.csv").write_text("caption\na star\na ring\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "unreadable").mkdir()
    (tmp_path / "unreadable" / "cut.png").write_bytes(b"\x89PNG cut off")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "secret.pdf").write_bytes(encrypted_pdf())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def encrypted_pdf() -> bytes:
    """A PDF file with a password."""
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 100 100] >>",
        f"<< /Filter /Standard /V 1 /R 2 /P -4 /O <{'41' * 32}> /U <{'42' * 32}> >>",
    ]
    content, starts = "%PDF-1.4\n", []
    for number, entry in enumerate(objects, 1):
        starts.append(len(content))
        content += f"{number} 0 obj\n{entry}\nendobj\n"
    table = "".join(f"{start:010} 00000 n \n" for start in starts)
    content += (
        f"xref\n0 5\n0000000000 65535 f \n{table}trailer\n<< /Size 5 /Root 1 0 R /Encrypt 4 0 R "
        f"/ID [<{'43' * 16}> <{'43' * 16}>] >>\nstartxref\n{len(content)}\n%%EOF\n"
    )
    return content.encode("ascii")


def plain_pdf(pages: int) -> bytes:
    """A PDF file of empty pages."""
    pypdfium2 = pytest.importorskip("pypdfium2")
    document = pypdfium2.PdfDocument.new()
    for _ in range(pages):
        document.new_page(200, 100)
    path = Path("plain.pdf")
    document.save(str(path))
    return path.read_bytes()


def names(source: str, **columns: str) -> list[str]:
    return [name for name, _ in read_items(source, Columns(**columns))]


def test_sources(sources: Path, caplog: pytest.LogCaptureFixture):
    assert names("photos") == ["blue.jpg", "deep/red.png"] and names("photos/blue.jpg") == ["blue.jpg"]
    (sources / "photos" / "deep" / "report.pdf").write_bytes(plain_pdf(2))
    pages = ["deep/report.pdf#page=1", "deep/report.pdf#page=2"]
    assert names("photos") == ["blue.jpg", "deep/red.png", *pages]
    assert names("photos/deep/report.pdf") == ["report.pdf#page=1", "report.pdf#page=2"]
    assert names("locked") == []
    assert "secret.pdf is left out: the PDF is encrypted; save a copy without a password" in caplog.text
    assert names("table.jsonl") == ["one", "two"] and names("named.csv", text="caption") == [
        "named.csv:0",
        "named.csv:1",
    ]
    images = datasets.Dataset.from_dict({"image": ["photos/blue.jpg"]}).cast_column("image", datasets.Image())
    images.to_parquet("images.parquet")
    images.save_to_disk("saved")
    assert names("images.parquet") == ["images.parquet:0"]
    assert [item.image.size() for _, item in read_items("saved") if item.image] == [(60, 60)]


def test_without_pypdfium2(sources: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    (sources / "photos" / "report.pdf").touch()
    assert names("photos") == ["blue.jpg", "deep/red.png"] and "1 PDF files are left out: reading" in caplog.text
    with pytest.raises(ImportError, match="pip install 'unime-st"):
        names("locked")


@pytest.mark.slow
def test_index_and_search(sources: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    assert main(["index", "photos", "--output", "index", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("2 items in index (flat)\nSearch it: unime search index")
    words = [
        "search",
        "index",
        "--image",
        "photos/deep/red.png",
        "--html",
        "gallery.html",
        "--json",
        "--device",
        "cpu",
    ]
    assert main(words) == 0
    hits = json.loads(capsys.readouterr().out)
    assert [hit["id"] for hit in hits] == ["deep/red.png", "blue.jpg"] and "the index has 2 items" in caplog.text
    assert hits[0]["image"] == str(sources / "photos" / "deep" / "red.png") and hits[0]["score"] > 0.999
    page = (sources / "gallery.html").read_text()
    assert page.count('src="data:image/') == page.count("src=") == 3 and "://" not in page and "href" not in page
    words = ["index", "table.jsonl", "--output", "index", "--overwrite", "--kind", "binary", "--embed-images"]
    assert main([*words, "--device", "cpu"]) == 0
    assert "2 items in index (binary, recall@10 " in capsys.readouterr().out
    (sources / "photos" / "blue.jpg").unlink()
    assert main(["search", "index", "a star", "--device", "cpu", "--html", "gallery.html", "--top", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("  one")
    assert "cannot be read" not in (sources / "gallery.html").read_text()
    reranked = ["search", "index", "a star", "--device", "cpu", "--top", "2", "--reranker", "unime-tiny", "--json"]
    scores = []
    for more in ([], ["--alpha", "20"], ["--alpha", "20", "--pair-order", "both"]):
        assert main([*reranked, *more]) == 0
        scores.append([(hit["score"], hit["similarity"]) for hit in json.loads(capsys.readouterr().out)])
    assert all(0 <= score <= 1 for score, _ in scores[0])
    odds = sorted(np.log(score / (1 - score)) + 20 * similarity for score, similarity in scores[0])
    assert [score for score, _ in scores[1]] == pytest.approx(odds[::-1], abs=1e-3)
    assert scores[2] != scores[1]
    assert main(["search", "index", "--queries", "table.jsonl", "--image-column", "", "--top", "1"]) == 1
    (sources / "queries.jsonl").write_text('{"id": "q", "text": "a star"}\n{"id": "r", "text": "a star"}\n')
    assert main(["search", "index", "--queries", "queries.jsonl", "--top", "1", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "q" and lines[2] == "r" and lines[1].endswith("  one") and lines[1] == lines[3]


def test_records_with_the_vectors_of_mining(sources: Path, capsys: pytest.CaptureFixture[str]):
    pairs = [PairRecord(Item(f"find {color}"), Item(f"a {color} star")) for color in ("red", "blue")]
    records = RecordSet.write("records", pairs, {"source": "test"})
    mine(records, UniME("unime-tiny", device="cpu"), "pools", vectors="vectors", num_candidates=1)
    written = {path: path.stat().st_mtime_ns for path in Path("vectors").glob("*.npy")}
    words = ["index", "records", "--output", "index", "--vectors", "vectors", "--device", "cpu"]
    assert main(words) == 0 and "2 items in index" in capsys.readouterr().out
    assert written == {path: path.stat().st_mtime_ns for path in Path("vectors").glob("*.npy")}
    assert main([*words, "--prompt", "x", "--overwrite"]) == 1
    assert "prompt: None there, 'x' now" in capsys.readouterr().err


def test_encode(sources: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    (sources / "photos" / "secret.pdf").write_bytes(encrypted_pdf())
    words = [
        "encode",
        "photos",
        "--output",
        "vectors",
        "--dtype",
        "float16",
        "--truncate-dim",
        "16",
        "--device",
        "cpu",
    ]
    assert main(words) == 0 and main(words) == 0
    assert capsys.readouterr().out == "2 vectors of dimension 16 in vectors\n" * 2
    assert json.loads(Path("vectors/ids.json").read_text()) == ["blue.jpg", "deep/red.png"]
    assert caplog.text.count("secret.pdf is left out") == 1, "PDF files are read once"
    expected = UniME("unime-tiny", device="cpu", truncate_dim=16).encode([{"image": "photos/blue.jpg"}])
    assert np.abs(VectorShards("vectors")[:1] - expected).max() < 1e-3
    Image.new("RGB", (60, 60), "green").save("photos/blue.jpg")
    assert main(words) == 1
    assert "vectors was made from other inputs or options (source: " in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["index", "absent", "--output", "out"], 1, "absent: no such file or folder"),
        (["encode", "empty", "--output", "out"], 1, "empty: contains no image, no video, no PDF file and no table"),
        (["encode", "locked", "--output", "out"], 1, "locked: nothing in it can be read"),
        (["index", "empty", "--output", "out"], 1, "empty: contains no image, no video, no PDF file and no table"),
        (["index", "unreadable", "--output", "out"], 1, "no item could be encoded, so there is nothing to index"),
        (["index", "locked", "--output", "out"], 1, "locked: nothing in it can be read"),
        (
            ["index", "named.csv", "--output", "out"],
            1,
            "found the columns caption: name those to index (--text-column",
        ),
        (["index", "table.jsonl", "--output", "photos"], 1, "photos exists; choose another folder"),
        (["index", "photos", "--output", "out", "--batch-size", "0"], 2, "--batch-size must be at least 1"),
        (["index", "photos", "--output", "out", "--vectors", "v"], 2, "photos is not one"),
        (["search", "photos", "a star"], 1, "not a stage folder"),
        (["search", "photos", "--image", "absent.png"], 1, "image absent.png: cannot be read"),
        (["search", "photos"], 2, "name a text, an image"),
        (["search", "photos", "x", "--queries", "table.jsonl"], 2, "name a text, an image"),
        (["search", "photos", "x", "--top", "0"], 2, "--top must be at least 1"),
        (["search", "photos", "x", "--alpha", "20"], 2, "are those of a reranker: add --reranker MODEL"),
        (["search", "photos", "x", "--reranker", "m", "--alpha", "nan"], 2, "--alpha must be a finite number"),
        (["search", "photos", "x", "--reranker", "m", "--fit-alpha", "out"], 2, "must name a folder of records"),
    ],
)
def test_wrong_calls(
    sources: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, message: str
):  # fmt: skip
    assert main(words) == status
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("out").exists() and not Path("out.build").exists()


def test_an_interrupted_command_goes_on(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    words = ["index", "photos", "--output", "index", "--device", "cpu"]
    with monkeypatch.context() as patched:
        patched.setattr(UniME, "forward", interrupted)
        assert main(words) == 130
    assert "unime index: interrupted; the same command goes on from here." in capsys.readouterr().err
    assert main(["search", "index", "x"]) == 1
    assert "the build of this index was interrupted" in capsys.readouterr().err
    assert main(words) == 0


SMALL_SHARDS = """
import sys, unime_st.encoding.engine as engine
engine.WINDOW = 50
from unime_st.cli import main
sys.exit(main(["index", "texts.csv", "--output", sys.argv[1], "--device", "cpu", "--batch-size", "1"]))
"""


@pytest.mark.slow
def test_a_killed_build_equals_an_uninterrupted_one(sources: Path):
    (sources / "texts.csv").write_text("text\n" + "".join(f"text number {number}\n" for number in range(1000)))
    command = ["-c", SMALL_SHARDS, "index"]
    with Program(command) as process:
        while process.poll() is None and len(list(Path("index.build").glob("vectors-*/*.npy"))) < 3:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not Path("index").exists()
    kept = {path: path.stat().st_mtime_ns for path in Path("index.build").glob("vectors-*/*.npy")}
    assert 3 <= len(kept) < 20
    for name in ("index", "whole"):
        run([*command[:-1], name], check=True)
    files = sorted(path.name for path in Path("whole").iterdir())
    assert files == sorted(path.name for path in Path("index").iterdir()) and len(files) == 4
    for name in files:
        assert Path("index", name).read_bytes() == Path("whole", name).read_bytes(), name


@pytest.mark.slow
def test_hit_rate_equals_that_of_the_mteb_task(emoji: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Queries are the names of the test split, alone and with their images; the images of both splits are the corpus."""
    import mteb

    from mteb_tasks import wrap
    from mteb_tasks.metadata import task_metadata
    from mteb_tasks.retrieval_task import ItemRetrievalTask
    from unime_st.data.scenes import RetrievalData

    table, rows = emoji / "test.parquet", dict(read_items(emoji / "test.parquet", Columns(text="name")))
    corpus = dict(read_items(emoji, Columns(text="")))
    assert len(corpus) == 2622 and len(rows) == 389
    texts = {name: Item(item.text) for name, item in rows.items()}

    class Emoji(ItemRetrievalTask):
        metadata = task_metadata(
            name="Emoji", description="Find the image of a name, and of an image with its name.", category="it2it",
            dataset={"path": str(emoji), "revision": "local"}, eval_langs=["eng-Latn"],
        )  # fmt: skip

        def retrieval_data(self, subset: str, split: str) -> RetrievalData:
            queries = {**texts, **{f"{name} with image": item for name, item in rows.items()}}
            return RetrievalData(queries, corpus, {name: {name.split()[0]} for name in queries}, None)

    scores = mteb.evaluate(wrap(UniME("unime-tiny", device="cpu")), Emoji(), cache=None).task_results[0].scores
    index, names_only = str(tmp_path / "index"), tmp_path / "queries.jsonl"
    names_only.write_text("".join(json.dumps({"id": name, "text": item.text}) + "\n" for name, item in texts.items()))
    assert main(["index", str(emoji), "--text-column", "", "--output", index, "--device", "cpu"]) == 0
    assert "2622 items" in capsys.readouterr().out
    hits = 0
    for words in ([str(names_only)], [str(table), "--text-column", "name"]):
        assert main(["search", index, "--queries", *words, "--top", "1", "--json", "--device", "cpu"]) == 0
        hits += sum(entry["hits"][0]["id"] == entry["query"] for entry in json.loads(capsys.readouterr().out))
    assert 0 < hits < 2 * 389 and hits / (2 * 389) == pytest.approx(scores["test"][0]["hit_rate_at_1"], abs=1e-5)
