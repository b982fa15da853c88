"""Tables, pages and archives of MMEB-V2, and what is said about bad ones."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.mmeb_v2.__main__ import main
from mteb_tasks.mmeb_v2.data_folder import DataFolder, archive_parts, dataset_tables
from mteb_tasks.mmeb_v2.page_files import official_bytes, page_files
from mteb_tasks.mmeb_v2.preflight import check_set, options_without_blank, read_set
from mteb_tasks.mmeb_v2.visdoc_sets import VISDOC_SETS, visdoc_set
from mteb_tasks.mmeb_v2.visdoc_tasks import VISDOC_TASKS

HL, CHART = visdoc_set("ViDoRe_esg_reports_human_labeled_v2"), visdoc_set("VisRAG_ChartQA")


def _available(root: Path) -> list:
    return [row for row in VISDOC_SETS if DataFolder(root).tables(row)]


def _change(file: Path, **columns: list) -> None:
    """Replace columns of a table; other rows stay."""
    table = pq.read_table(file)
    for name, values in columns.items():
        index = table.column_names.index(name)
        table = table.set_column(index, name, pa.array(values, table.schema.field(name).type))
    pq.write_table(table, file)


def _floats(file: Path, name: str, changed: dict[int, float]) -> None:
    """Store a column as floats and change some of its rows."""
    table = pq.read_table(file)
    index, values = table.column_names.index(name), table.column(name).to_pylist()
    floats = pa.array([float(changed.get(row, value)) for row, value in enumerate(values)])
    pq.write_table(table.set_column(index, name, floats), file)


def test_golden_sets(golden_v2: Path) -> None:
    folder = DataFolder(golden_v2 / "data")
    assert len(_available(folder.root)) >= 2
    for row in _available(folder.root):
        tables = read_set(folder, row)
        official = json.loads((golden_v2 / "results" / row.key / "result.json").read_text())
        assert sorted(map(str, official["candidate_names"])) == sorted(tables.pages)
        for query, found in zip(official["queries"], tables.grades.values()):
            assert found == dict(zip(map(str, query["label"]), query["rel_scores"]))
            assert list(found) == list(map(str, query["label"]))  # the order feeds the official nDCG
    checked = {row.key: check_set(folder, row) for row in _available(folder.root)}
    assert "2 pages encoded again as JPEG" in checked[CHART.key]
    assert "5 queries (published: 52)" in checked[HL.key] and "2 judgements given again" in checked[HL.key]


def test_pages_of_the_table_are_those_of_the_official_layout(golden_v2: Path, tmp_path: Path) -> None:
    """Lossless pages have the official pixels; those with a `.jpg` id are encoded again, to the official pixels."""
    alone = tmp_path / "alone"
    (alone / "annotations").parent.mkdir(parents=True)
    shutil.copytree(golden_v2 / "data" / "annotations", alone / "annotations")
    compared = 0
    for row in _available(alone):
        tables = read_set(DataFolder(alone), row)
        for page, file in zip(tables.pages, page_files(tables, DataFolder(alone))):
            official = golden_v2 / "data" / "visdoc-tasks" / row.folder / row.page_file(page)
            if official.is_file():
                with Image.open(file) as ours, Image.open(official) as theirs:
                    assert ours.convert("RGB").tobytes() == theirs.convert("RGB").tobytes()
                compared += 1
    assert compared >= 9


def test_archives(mini: Path, tmp_path: Path) -> None:
    """Archives of the hub's layout are unpacked once, also from parts; a missing part is named."""
    hub = tmp_path / "hub" / "visdoc-tasks"
    hub.mkdir(parents=True)
    for archive, source, inside in (
        ("visdoc-tasks.data.tar.gz", mini / "annotations" / HL.hub, f"data/{HL.hub.partition('/')[2]}"),
        ("visdoc-tasks.images.tar.gz", mini / "visdoc-tasks" / HL.folder, f"images/{HL.folder}"),
    ):
        with tarfile.open(hub / archive, "w:gz") as opened:
            opened.add(source, inside)
    whole = (hub / "visdoc-tasks.images.tar.gz").read_bytes()
    (hub / "visdoc-tasks.images.tar.gz").unlink()
    for number in range(3):
        part = whole[number * len(whole) // 3 : (number + 1) * len(whole) // 3]
        (hub / f"visdoc-tasks.images.tar.gz-{number:02d}").write_bytes(part)
    folder = DataFolder(hub.parent)
    assert not DataFolder(hub.parent, unpack=False).tables(HL)
    files = page_files(read_set(folder, HL), folder)
    assert {file.parent.name for file in files} == {HL.folder}
    (hub / "visdoc-tasks.images.tar.gz-01").unlink()
    with pytest.raises(MMEBDataError, match=r"images.tar.gz-01 is missing"):
        archive_parts(hub / "visdoc-tasks.images.tar.gz")
    (hub / "visdoc-tasks.images.tar.gz-02").unlink()
    first = (hub / "visdoc-tasks.images.tar.gz-00").rename(hub / "visdoc-tasks.tar.gz-00")  # the hub's other name
    (hub / "visdoc-tasks.tar.gz-01").write_bytes(whole[len(first.read_bytes()) :])
    assert {file.name for file in page_files(read_set(folder, HL), folder)} == {file.name for file in files}
    (hub / "visdoc-tasks.tar.gz-01").unlink()
    first.rename(hub / "visdoc-tasks.images.tar.gz-00")
    with pytest.raises(MMEBDataError, match=r"is a part after visdoc-tasks.images.tar.gz-00 missing"):
        DataFolder(hub.parent).page_folder(HL)


def test_the_hub_s_cache(mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `$MMEB_V2_DIR` a set is read from the hub's cache at mteb's revision, which stands in the metadata."""
    monkeypatch.delenv("MMEB_V2_DIR", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (task,) = (task() for task in VISDOC_TASKS if task.row is HL)
    with pytest.raises(MMEBDataError, match=r"esg_reports_human_labeled_v2 cannot be fetched .* set MMEB_V2_DIR"):
        task.load_data()
    commit = HL.source["revision"]
    cached = tmp_path / "hub" / f"datasets--{HL.source['path'].replace('/', '--')}" / "snapshots" / commit
    shutil.copytree(mini / "annotations" / HL.hub, cached)
    task.load_data()
    assert task.hf_subsets == ["vlm2vec"] and task.metadata.dataset["revision"] == commit
    assert len(task.dataset["vlm2vec"]["test"]["corpus"]) == 9


def test_pages_in_a_mode_that_jpeg_lacks() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (40, 20), (200, 0, 0, 90)).save(buffer, "PNG")
    with Image.open(io.BytesIO(official_bytes(buffer.getvalue(), as_jpeg=True))) as page:
        assert page.format == "JPEG" and page.mode == "RGB"


def test_hub_layouts(mini: Path, tmp_path: Path) -> None:
    """Configs of a dataset card decide; without them, usual names do."""
    source = mini / "annotations" / HL.hub
    carded = tmp_path / "carded"
    carded.mkdir()
    names = {"corpus": "pages", "queries": "questions", "default": "judgements"}
    for config, name in names.items():
        table = "qrels" if config == "default" else config
        shutil.copy(source / table / "test.parquet", carded / f"{name}-0.parquet")
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n  - split: test\n    path: {name}-*\n"
        for config, name in names.items()
    )
    (carded / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{configs}---\n# Card\n")
    assert {name: files[0].name for name, files in dataset_tables(carded, "test").items()} == {
        "queries": "questions-0.parquet",
        "corpus": "pages-0.parquet",
        "qrels": "judgements-0.parquet",
    }
    (carded / "README.md").write_bytes(b"---\n\xff\n---\n")
    assert dataset_tables(carded, "test") == {}
    flat = tmp_path / "flat" / "data"
    flat.mkdir(parents=True)
    for table in ("corpus", "queries", "qrels"):
        shutil.copy(source / table / "test.parquet", flat / f"{table}-00000-of-00001.parquet")
    assert len(dataset_tables(flat.parent, "test")) == 3


FAULTS = {
    "missing page": (
        lambda root: (root / "visdoc-tasks" / HL.folder / "57.png").unlink(),
        r"row 1: page .*57.png is mis",
    ),
    "broken page": (
        lambda root: (root / "visdoc-tasks" / HL.folder / "57.png").write_bytes(b"no image at all"),
        r"corpus.test.parquet: row 1: page .*57.png is broken",
    ),
    "query without judgement": (
        lambda root: _change(
            root / "annotations" / HL.hub / "queries" / "test.parquet", **{"query-id": [0, 5, 10, 15, 99]}
        ),
        r"queries.test.parquet: row 4: query '99' has no relevant page",
    ),
    "unknown page": (
        lambda root: _change(root / "annotations" / HL.hub / "corpus" / "test.parquet", **{"corpus-id": [*range(9)]}),
        r"qrels.test.parquet: row 0: page '1290' is not in the corpus",
    ),
    "repeated id": (
        lambda root: _change(
            root / "annotations" / HL.hub / "queries" / "test.parquet", **{"query-id": [0, 5, 10, 15, 5]}
        ),
        r"queries.test.parquet: row 4: query-id '5' is there twice",
    ),
    "no text": (
        lambda root: _change(
            root / "annotations" / HL.hub / "queries" / "test.parquet", query=["a", None, "c", "d", "e"]
        ),
        r"queries.test.parquet: row 1: the query is None",
    ),
    "grade that is not a number": (
        lambda root: _floats(root / "annotations" / HL.hub / "qrels" / "test.parquet", "score", {2: float("nan")}),
        r"qrels.test.parquet: row 2: score is nan, expected an integer",
    ),
    "cut-off table": (
        lambda root: (root / "annotations" / HL.hub / "qrels" / "test.parquet").write_bytes(b"PAR1"),
        r"qrels.test.parquet cannot be read",
    ),
    "missing shard": (
        lambda root: (root / "annotations" / HL.hub / "corpus" / "test.parquet").rename(
            root / "annotations" / HL.hub / "corpus" / "test-00000-of-00002.parquet"
        ),
        r"corpus.test-00001-of-00002.parquet is missing: download this part",
    ),
    "missing set": (lambda root: shutil.rmtree(root / "annotations" / HL.hub), "is missing: expected"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_file_and_row(name: str, mini: Path) -> None:
    damage, message = FAULTS[name]
    damage(mini)
    with pytest.raises(MMEBDataError, match=message):
        check_set(DataFolder(mini), HL)


def test_broken_pages_of_a_table(mini: Path) -> None:
    file = mini / "annotations" / CHART.hub / "corpus" / "train.parquet"
    table = pq.read_table(file)
    images = table.column("image").to_pylist()
    images[2]["bytes"] = images[2]["bytes"][:1000]
    pq.write_table(table.set_column(1, "image", pa.array(images, table.schema.field("image").type)), file)
    with pytest.raises(MMEBDataError, match=r"train.parquet: row 2: page 'a.b.c.png' is broken"):
        check_set(DataFolder(mini), CHART)


def test_a_damaged_column_of_pages(mini: Path) -> None:
    """Ids can be read and pages cannot: the file and the first row that fails are named."""
    shutil.rmtree(mini / "visdoc-tasks")
    file = mini / "annotations" / CHART.hub / "corpus" / "train.parquet"
    content = bytearray(file.read_bytes())
    middle = slice(len(content) // 3, len(content) // 3 + 400)
    content[middle] = bytes(byte ^ 0x5A for byte in content[middle])
    file.write_bytes(content)
    with pytest.raises(MMEBDataError, match=r"corpus.train.parquet: row 0 cannot be read .*: download it again"):
        check_set(DataFolder(mini), CHART)


def test_turned_pages_are_made_upright(mini: Path) -> None:
    """The hub's reader applies the EXIF orientation of a table's pages."""
    file = mini / "annotations" / CHART.hub / "corpus" / "train.parquet"
    table = pq.read_table(file)
    images, buffer, exif = table.column("image").to_pylist(), io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(buffer, "PNG", exif=exif)
    images[0]["bytes"] = buffer.getvalue()
    pq.write_table(table.set_column(1, "image", pa.array(images, table.schema.field("image").type)), file)
    tables = read_set(DataFolder(mini), CHART)
    with Image.open(page_files(tables, DataFolder(mini))[0]) as page:
        assert page.size == (20, 40) and page.getexif().get(0x0112, 1) == 1


def test_options_without_blank(tmp_path: Path) -> None:
    folder = tmp_path / "annotations" / "VLM2Vec" / "EgoSchema" / "Subset"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"option": [["A. x", "B. y"], ["A. x", "B.y"]]}), folder / "test.parquet")
    assert options_without_blank(tmp_path) == {"EgoSchema": 1}


def test_the_command_lists_all_tasks(
    mini: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Sizes of what is there, faults, and the names of what is missing."""
    monkeypatch.setenv("MMEB_V2_DIR", str(mini))
    (mini / "visdoc-tasks" / HL.folder / "57.png").unlink()
    assert main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{HL.key}: FAULTY: ") and "57.png is missing" in line for line in lines)
    assert any(line.startswith("VisRAG_ChartQA: 3 queries (published: 63), 4 pages") for line in lines)
    assert lines[-1].startswith("missing: ImageNet-1K, ") and "VisRAG_ChartQA" not in lines[-1]
