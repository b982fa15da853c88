"""Released UniME-V2 files: lossless import and export, streaming of JSON lists."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unime_st.data import Item, PairRecord, RecordSet
from unime_st.data.released_judgements import export_released, import_released
from unime_st.data.sources import json_list

RETRIEVE = "<|image_1|>\nFind an image caption describing the given image.\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "MMEB-train" / "images" / "A-OKVQA" / "Train"
    folder.mkdir(parents=True)
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg")
    return tmp_path / "MMEB-train"


def record(index: int = 0, **changes: object) -> dict:
    image = f"images/A-OKVQA/Train/{index % 4}.jpg"
    rng = np.random.default_rng(index)
    return {
        "query_text": RETRIEVE,
        "query_image": image,
        "pos_text": f"a caption é {index}",
        "pos_image": "",
        "query_pos_scores": float(rng.random()),
        "hard_negatives": [[f"caption {rank}", ""] for rank in range(9)] + [["<|image_1|>\n", image]],
        "hard_negatives_scores": [0.0, 1.0, *rng.random(8).tolist()],
        **changes,
    }


def written(tmp_path: Path, records: list) -> Path:
    path = tmp_path / "train_data.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


ODD = [
    record(1, query_text="no placeholder at all"),
    record(2, query_text="middle <|image_1|> of the text"),
    record(3, pos_text="<|image_1|> without an image"),
    record(4, query_text="<|image_1|><|image_1|>\n"),
    record(5, query_text=""),
    record(6, id="more fields", nested={"a": [1]}),
    record(7, query_pos_scores=1, hard_negatives=[], hard_negatives_scores=[]),
    dict(reversed(record(8).items())),
    record(9, query_image="images/A-OKVQA/../A-OKVQA/Train/1.jpg"),
]


@pytest.mark.parametrize("read_images", [True, False])
def test_lossless_both_ways(read_images: bool, root: Path, tmp_path: Path):
    originals = [*map(record, range(30)), *ODD]
    # The same image under a second path: one item, yet two paths that must both come back.
    twin = root / "images" / "A-OKVQA" / "twin.jpg"
    twin.write_bytes((root / "images/A-OKVQA/Train/0.jpg").read_bytes())
    originals.append(record(0, query_image="images/A-OKVQA/twin.jpg"))
    source = written(tmp_path, originals)
    records = import_released(source, tmp_path / "out", image_root=root, read_images=read_images)
    assert export_released(records, tmp_path / "again.json") == len(originals)
    again = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
    assert json.dumps(again) == json.dumps(originals)
    stored = [row is not None for row in records.rows["source"].to_pylist()]
    assert sum(stored[:30]) == 0, "records in the usual form are not stored twice"


def test_what_training_sees(root: Path, tmp_path: Path):
    first = import_released(written(tmp_path, [record(1)]), tmp_path / "out", image_root=root)[0]
    assert first.query.text == "\nFind an image caption describing the given image.\n"
    assert first.query.image.path == str(root.resolve() / "images/A-OKVQA/Train/1.jpg")
    assert first.dataset == "A-OKVQA" and first.positive.modality == "text"
    assert len(first.negatives) == 10 and first.negatives[9].text == "\n"
    score = record(1)["query_pos_scores"]
    assert first.positive_logit == np.float32(1.05 * np.log(score / (1 - score)))
    assert first.negative_logits[:2] == (-40, 40)


def test_divisor_is_an_option(root: Path, tmp_path: Path):
    source = written(tmp_path, [record(1, query_pos_scores=0.75)])
    first = import_released(source, tmp_path / "out", image_root=root, score_divisor=1.0)[0]
    assert first.positive_logit == np.float32(np.log(3.0))


def test_bad_records_are_set_aside(root: Path, tmp_path: Path):
    (root / "images" / "bad.jpg").write_bytes(b"nothing")
    bad = [
        record(query_pos_scores=1.2),
        record(query_pos_scores="0.3"),
        record(query_pos_scores=float("nan")),
        record(hard_negatives_scores=[0.1]),
        record(hard_negatives=[["text"]]),
        record(hard_negatives=None),
        record(query_text=None),
        record(pos_text="", pos_image=""),
        record(query_image="images/absent.jpg"),
        record(query_image="images/bad.jpg"),
        record(query_image="../../etc/passwd"),
        "not a record",
    ]
    records = import_released(written(tmp_path, [*bad, record(3)]), tmp_path / "out", image_root=root)
    assert len(records) == 1 and records.manifest["rejected"] == len(bad)
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["row"] for line in lines) == list(range(len(bad)))


def test_own_records_take_the_released_form(tmp_path: Path):
    image = Image.new("RGB", (4, 4), "red")
    pair = PairRecord(Item("find", image), Item("p"), "d", (Item("n"), Item(image=image)), 2.0, (-1.0, 0.0))
    records = RecordSet.write(tmp_path / "set", [pair], {})
    with pytest.raises(ValueError, match="image_folder"):
        export_released(records, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    export_released(records, tmp_path / "out.json", image_folder=tmp_path / "images", score_divisor=1.0)
    (written_back,) = json.loads((tmp_path / "out.json").read_text())
    assert written_back["query_text"] == "<|image_1|>find" and written_back["hard_negatives"][0] == ["n", ""]
    assert written_back["query_image"] == written_back["hard_negatives"][1][1] != ""
    assert written_back["hard_negatives_scores"][1] == 0.5
    again = import_released(tmp_path / "out.json", tmp_path / "in", image_root=tmp_path / "images", score_divisor=1.0)
    assert again[0].query == pair.query and again[0].negatives == pair.negatives
    np.testing.assert_allclose([again[0].positive_logit, *again[0].negative_logits], [2, -1, 0], atol=1e-6)


def test_unjudged_records_are_refused(tmp_path: Path):
    records = RecordSet.write(tmp_path / "set", [PairRecord(Item("q"), Item("p"))], {})
    with pytest.raises(ValueError, match="not judged"):
        export_released(records, tmp_path / "out.json")


def test_reading_a_long_list_needs_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("unime_st.data.sources._CHUNK", 1 << 14)
    path = tmp_path / "long.json"
    with path.open("w", encoding="utf-8") as handle:
        handle.write("[" + ",\n".join(json.dumps(record(0)) for _ in range(12_000)) + "]")
    tracemalloc.start()
    count = sum(1 for _ in json_list(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 12_000 and path.stat().st_size > 20 * peak


@pytest.mark.parametrize(
    ("text", "elements"),
    [
        ("[]", []),
        (" [ ] \n", []),
        ('\ufeff[{"a": [1, {"b": "]}"}]}, 2, "x"]', [{"a": [1, {"b": "]}"}]}, 2, "x"]),
        ("[12345]", [12345]),
        ('["' + "é" * 3_000_000 + '", {}]', ["é" * 3_000_000, {}]),
    ],
)
def test_json_list(text: str, elements: list, tmp_path: Path):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert list(json_list(tmp_path / "a.json")) == elements


def test_json_list_split_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("unime_st.data.sources._CHUNK", 1)
    elements = [123, -1.5e-7, 'a]\\"', {"x": [1, {"y": None}]}, [], True, record(0)]
    (tmp_path / "a.json").write_text(json.dumps(elements, indent=2))
    assert list(json_list(tmp_path / "a.json")) == elements


@pytest.mark.parametrize("text", ["", "{}", "[1", "[1,]", "[1 2]", "[1] 2", '[{"a": 1}', "[nope]"])
def test_damaged_json_list(text: str, tmp_path: Path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a.json"):
        list(json_list(tmp_path / "a.json"))
