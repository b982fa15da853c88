"""Import of TIGER-Lab/MMEB-train, from a copy with the published layout."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unime_st.data.mmeb_train import import_mmeb_train
from unime_st.data.released_judgements import import_released
from unime_st.stages import ImportArguments, run_import


@pytest.fixture
def mmeb(tmp_path: Path) -> Path:
    """Two of the 20 sets: image+text to text, and text to image; one image is missing, one row is empty."""
    folder = tmp_path / "MMEB-train"
    for name in ("images/A-OKVQA/Train/1.jpg", "images/MSCOCO_t2i/Train/2.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "red" if "1" in name else "blue").save(folder / name)
    rows = {
        "A-OKVQA": [
            ("<|image_1|>\nWhat is it?\n", "images/A-OKVQA/Train/1.jpg", "a wall", ""),
            ("<|image_1|>\nWho is it?\n", "images/A-OKVQA/Train/absent.jpg", "nobody", ""),
            ("<|image_1|>\nWhere is it?\n", "images/A-OKVQA/Train/1.jpg", "", ""),
        ],
        "MSCOCO_t2i": [("Find the sea.", "", "<|image_1|>\nRepresent the image.", "images/MSCOCO_t2i/Train/2.jpg")],
    }
    for subset, values in rows.items():
        (folder / subset).mkdir()
        columns = ("qry", "qry_image_path", "pos_text", "pos_image_path")
        table = pa.table({name: [row[index] for row in values] for index, name in enumerate(columns)})
        pq.write_table(table, folder / subset / "original-00000-of-00001.parquet")
    return folder


def test_pairs_are_imported_and_bad_rows_counted(mmeb: Path, tmp_path: Path) -> None:
    options = ImportArguments(str(mmeb), str(tmp_path / "records"), layout="mmeb-train")
    records = run_import(options)
    assert [(pair.dataset, pair.query.text, pair.positive.modality) for pair in records] == [
        ("A-OKVQA", "\nWhat is it?\n", "text"),
        ("MSCOCO_t2i", "Find the sea.", "image+text"),
    ]
    assert records.manifest["rejected"] == 2 and records.manifest["subsets"] == ["A-OKVQA", "MSCOCO_t2i"]
    rejected = [json.loads(line) for line in (records.folder / "rejected.jsonl").read_text().splitlines()]
    assert {(entry["file"], entry["row"]) for entry in rejected} == {
        ("A-OKVQA/original-00000-of-00001.parquet", 1),
        ("A-OKVQA/original-00000-of-00001.parquet", 2),
    }
    assert len(records) == len(run_import(options)), "a finished import is not redone"


def test_items_are_those_of_the_released_files(mmeb: Path, tmp_path: Path) -> None:
    row = {
        "query_text": "<|image_1|>\nWhat is it?\n",
        "query_image": "images/A-OKVQA/Train/1.jpg",
        "pos_text": "a wall",
        "pos_image": "",
        "query_pos_scores": 0.9,
        "hard_negatives": [["a dog", ""]],
        "hard_negatives_scores": [0.1],
    }
    (tmp_path / "released.json").write_text(json.dumps([row]))
    for read in (True, False):
        pairs = import_mmeb_train(mmeb, tmp_path / f"pairs-{read}", subsets=["A-OKVQA"], read_images=read, limit=1)
        judged = import_released(
            tmp_path / "released.json", tmp_path / f"rows-{read}", image_root=mmeb, read_images=read
        )
        assert pairs[0].query.id == judged[0].query.id and pairs[0].positive == judged[0].positive


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subsets": ["CIRR"]}, "no original-.*parquet in CIRR"),
        ({"split": "absent"}, "expected a copy of the dataset"),
    ],
)
def test_what_is_not_there_is_named(mmeb: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        import_mmeb_train(mmeb, tmp_path / "records", **options)


def test_nli_pairs_come_from_csv(tmp_path: Path) -> None:
    source = tmp_path / "nli_for_simcse.csv"
    source.write_text('sent0,sent1,hard_neg\n"A man, running.",A person moves.,Nobody.\nshort\n', encoding="utf-8")
    pairs = [{"dataset": "nli", "query": {"text": "sent0"}, "positive": {"text": "sent1"}}]
    records = run_import(ImportArguments(str(source), str(tmp_path / "nli"), pairs=pairs))
    assert [(pair.query.text, pair.positive.text, pair.dataset) for pair in records] == [
        ("A man, running.", "A person moves.", "nli")
    ]
    assert "number of cells differs" in (records.folder / "rejected.jsonl").read_text()


@pytest.mark.parametrize("layout", ["own", "released"])
def test_missing_options_are_named(tmp_path: Path, layout: str) -> None:
    option = "source" if layout == "own" else "image_root"
    with pytest.raises(ValueError, match=f"{option} is missing"):
        run_import(ImportArguments("" if layout == "own" else "a.json", str(tmp_path / "records"), layout=layout))
