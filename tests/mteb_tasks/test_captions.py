"""Caption sets and SugarCrepe against the authors' numbers, and what is said about faulty folders."""

from __future__ import annotations

import json
import os
import shutil

import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mteb.abstasks import AbsTask
from noisy_encoder import Noisy
from PIL import Image

from mteb_tasks import captions, evaluate
from mteb_tasks.captions import CAPTION_TASKS, read_karpathy, read_sharegpt4v, read_urban1k
from mteb_tasks.sugarcrepe import CATEGORIES, SugarCrepeByCategory

OFFICIAL = {"Flickr30k1k": "flickr30k", "COCO5k": "coco2014", "ShareGPT4V": "sharegpt4v", "Urban1K": "Urban200K"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIME_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("task", CAPTION_TASKS, ids=lambda task: task.metadata.name)
def test_caption_sets_give_the_official_hits(released, official, home, monkeypatch, task):
    monkeypatch.setenv("UNIME_EVAL_DIR", str(official / "eval"))
    monkeypatch.setattr(captions, "LONG_CAPTION_RECORDS", 10)  # as the authors' code was run on these few
    made = task()
    (scores,) = evaluate(released, [made], home / "out")[made.metadata.name].values()
    source = next(name for name in OFFICIAL if made.metadata.name.startswith(name))
    results = official / "eval/official_results"
    metrics = json.loads((results / "retrieval.json").read_text())[OFFICIAL[source]]["independent_metrics"]
    direction = "text_to_image" if task.to_image else "image_to_text"
    for k in (1, 5, 10):
        assert scores[f"hit_rate_at_{k}"] == pytest.approx(metrics[f"{direction}_R@{k}"], abs=1e-5)
    top = json.loads((results / f"retrieval_{OFFICIAL[source]}_top10.json").read_text())[f"{direction}_top10"]
    (subset,) = made.hf_subsets
    ranked = json.loads((home / "out" / f"{made.metadata.name}_predictions.json").read_text())[subset]["test"]
    documents = list(made.dataset[subset]["test"]["corpus"]["id"])
    texts = made.dataset[subset]["test"]["corpus"]["official_text"]
    for row, query in enumerate(made.dataset[subset]["test"]["queries"]["id"]):
        best = max(ranked[query], key=ranked[query].get)
        expected = top[row][0]
        assert best == documents[expected] or texts[documents.index(best)] == texts[expected] != ""


def test_sugarcrepe_gives_the_official_scores(released, official, home, monkeypatch):
    monkeypatch.setenv("UNIME_EVAL_DIR", str(official / "eval"))
    scores = evaluate(released, [SugarCrepeByCategory()], home)["SugarCrepeByCategory"]
    subsets = json.loads((official / "eval/official_results/sugarcrepe.json").read_text())["subsets"]
    saved = json.loads((home / "SugarCrepeByCategory_predictions.json").read_text())
    assert [name.split("-")[0] for name in scores] == list(CATEGORIES)
    for name, found in scores.items():
        expected = subsets[name.split("-")[0]]
        assert found["text_acc"] == pytest.approx(expected["accuracy"])
        cosines = [row["caption"] for row in saved[name]["test"].values()]
        np.testing.assert_allclose(cosines, expected["pos_scores"], atol=1e-5)


def _image(path, color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20), color).save(path)


def test_urban1k_reads_first_lines_in_number_order(tmp_path):
    for name in ("2", "10", "1"):
        _image(tmp_path / "image" / f"{name}.jpg")
        (tmp_path / "caption").mkdir(exist_ok=True)
        (tmp_path / "caption" / f"{name}.txt").write_text(f"caption {name}" + ("\nmore\n" if name == "2" else ""))
    assert [one.captions[0] for one in read_urban1k(tmp_path)] == ["caption 1", "caption 2\n", "caption 10"]
    (tmp_path / "caption" / "10.txt").unlink()
    with pytest.raises(ValueError, match=r"10.jpg has no caption"):
        list(read_urban1k(tmp_path))


def test_sharegpt4v_takes_the_answer_in_one_line_and_names_missing_images(tmp_path):
    records = [{"image": "images/0.jpg", "conversations": [{"value": "?"}, {"value": "a\nb"}]}]
    file = tmp_path / "share-captioner_coco_lcs_sam_1246k_1107.json"
    file.write_text(json.dumps(records))
    with pytest.raises(FileNotFoundError, match=r"record 0 names images/0.jpg"):
        list(read_sharegpt4v(tmp_path))
    _image(tmp_path / "images" / "0.jpg")
    assert [one.captions for one in read_sharegpt4v(tmp_path)] == [("a b",)]
    _image(tmp_path.parent / "secret.jpg")
    for outside in ("../secret.jpg", str(tmp_path.parent / "secret.jpg")):
        file.write_text(json.dumps([{**records[0], "image": outside}]))
        with pytest.raises(FileNotFoundError, match=r"record 0 names .*secret.jpg, which is not in"):
            list(read_sharegpt4v(tmp_path))


def _karpathy(folder, rows):
    from datasets import Dataset

    folder.mkdir(parents=True, exist_ok=True)
    images = [Image.new("RGB", (20, 20), (40 * row, 0, 0)) for row in range(len(rows))]
    Dataset.from_dict({"image": images, "text": rows}).to_parquet(str(folder / "data.parquet"))


def test_five_captions_in_both_directions(tiny, home, monkeypatch):
    rows = [[f"image {row} caption {index}" for index in range(6)] for row in range(4)]
    rows[1][0] = rows[0][0]
    _karpathy(home / "flickr30k_test", rows)
    monkeypatch.setenv("UNIME_EVAL_DIR", str(home))
    to_text, to_image = (task() for task in CAPTION_TASKS[:2])
    scores = evaluate(tiny, [to_text, to_image])
    (backward,) = scores["Flickr30k1kI2TRetrieval"].values()
    assert backward["recall_at_1"] <= 0.2 and backward["hit_rate_at_1"] in (0, 0.25, 0.5, 0.75, 1)
    (data,) = to_text.dataset.values()
    assert len(data["test"]["corpus"]) == 20
    assert [len(found) for found in data["test"]["relevant_docs"].values()] == [6, 6, 5, 5]  # one text was said twice
    (data,) = to_image.dataset.values()
    assert all(len(found) == 1 for found in data["test"]["relevant_docs"].values())
    assert len(list((home / "home" / "images").glob("*"))) == 1  # written once for both directions


def test_rows_without_five_captions_are_named(home):
    _karpathy(home / "set", [["only one"]])
    with pytest.raises(ValueError, match=r"data.parquet: row 0 has fewer than 5"):
        list(read_karpathy(home / "set"))


def test_a_missing_folder_says_what_is_expected(monkeypatch, tmp_path):
    monkeypatch.delenv("UNIME_EVAL_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match="set UNIME_EVAL_DIR"):
        CAPTION_TASKS[0]().load_data()
    monkeypatch.setenv("UNIME_EVAL_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="has no folder sugarcrepe"):
        SugarCrepeByCategory().load_data()


def test_sugarcrepe_names_missing_images_and_counts_ties_as_wrong(tiny, home, monkeypatch):
    folder = home / "sugarcrepe"
    (folder / "data").mkdir(parents=True)
    for category in CATEGORIES:
        pair = {"filename": "1.jpg", "caption": "the same words", "negative_caption": "the same words"}
        (folder / "data" / f"{category}.json").write_text(json.dumps({"0": pair}))
    monkeypatch.setenv("UNIME_EVAL_DIR", str(home))
    with pytest.raises(FileNotFoundError, match=r"image 1.jpg of pair 0"):
        SugarCrepeByCategory().load_data()
    _image(folder / "val2017" / "1.jpg")
    scores = evaluate(tiny, [SugarCrepeByCategory()])["SugarCrepeByCategory"]
    assert {(found["text_acc"], found["tie_rate"]) for found in scores.values()} == {(0.0, 1.0)}
    _image(folder / "outside.jpg")
    outside = {"filename": "../outside.jpg", "caption": "some words", "negative_caption": "other words"}
    (folder / "data" / "swap_obj.json").write_text(json.dumps({"3": outside}))
    with pytest.raises(FileNotFoundError, match=r"image ../outside.jpg of pair 3 is not in"):
        SugarCrepeByCategory().load_data()
    shutil.rmtree(folder / "val2017")


def _sugarcrepe(folder):
    (folder / "data").mkdir(parents=True)
    for category in CATEGORIES:
        pair = {"filename": "1.bmp", "caption": "some words", "negative_caption": "other words"}
        (folder / "data" / f"{category}.json").write_text(json.dumps({"7": pair}))
    _image(folder / "val2017" / "1.bmp")


@pytest.mark.parametrize("linked", [False, True])
def test_another_image_is_other_data_though_size_and_time_are_the_same(home, monkeypatch, linked):
    _sugarcrepe(home / "sugarcrepe")
    _image(home / "Urban1k" / "image" / "1.bmp")
    monkeypatch.setenv("UNIME_EVAL_DIR", str(home))
    images = [home / "sugarcrepe" / "val2017" / "1.bmp", home / "Urban1k" / "image" / "1.bmp"]
    for index, image in enumerate(images):
        if linked:
            image.parent.rename(home / f"elsewhere-{index}")
            image.parent.symlink_to(home / f"elsewhere-{index}")
            (image.parent / "back").symlink_to(image.parents[1])  # a link into a folder above
    tasks = [SugarCrepeByCategory, CAPTION_TASKS[-1]]
    before = [task().hf_subsets for task in tasks]
    assert [task().hf_subsets for task in tasks] == before
    for image in images:
        found = image.stat()
        _image(image, "blue")
        os.utime(image, ns=(found.st_atime_ns, found.st_mtime_ns))
        assert image.stat().st_size == found.st_size
    assert all(not set(task().hf_subsets) & set(subsets) for task, subsets in zip(tasks, before))


def _cut(file):
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("sugarcrepe/val2017/1.bmp", "replace_obj.json: the image 1.bmp of pair 7 is broken"),
        ("sugarcrepe/data/swap_att.json", "swap_att.json cannot be read"),
        ("Urban1k/image/1.png", "1.png is broken"),
        ("shareGPT4v/images/0.png", "record 0: image images/0.png is broken"),
        ("shareGPT4v/share-captioner.json", "share-captioner.json cannot be read"),
        ("flickr30k_test/data.parquet", "data.parquet cannot be read"),
        ("coco_test/data.parquet", "data.parquet: row 1: its image is broken"),
    ],
)
def test_damaged_files_are_named_before_anything_is_encoded(home, monkeypatch, file, message):
    _sugarcrepe(home / "sugarcrepe")
    _image(home / "Urban1k" / "image" / "1.png")
    (home / "Urban1k" / "caption").mkdir()
    (home / "Urban1k" / "caption" / "1.txt").write_text("a street")
    _image(home / "shareGPT4v" / "images" / "0.png")
    records = [{"image": "images/0.png", "conversations": [{"value": "?"}, {"value": "a"}]}]
    (home / "shareGPT4v" / "share-captioner.json").write_text(json.dumps(records))
    for name in ("flickr30k_test", "coco_test"):
        _karpathy(home / name, [[f"{row} {index}" for index in range(5)] for row in range(2)])
    monkeypatch.setenv("UNIME_EVAL_DIR", str(home))
    (name,) = [
        name for name in ("sugarcrepe", "Urban", "ShareGPT4V", "Flickr", "COCO") if name.lower() in file.lower()
    ]
    kinds: list[type[AbsTask]] = [*CAPTION_TASKS[::2], SugarCrepeByCategory]
    (task,) = [task for task in kinds if name.lower() in task.metadata.name.lower()]
    task().load_data()
    if file.startswith("coco"):
        table = pq.read_table(home / file)
        images = table["image"].to_pylist()
        images[1]["bytes"] = images[1]["bytes"][:-20]
        pq.write_table(table.set_column(0, "image", pa.array(images)), home / file)
    else:
        _cut(home / file)
    with pytest.raises(ValueError, match=message):
        task().load_data()


def test_a_second_model_is_filed_under_the_same_local_data(home, monkeypatch):
    _sugarcrepe(home / "sugarcrepe")
    _image(home / "Urban1k" / "image" / "1.png")
    (home / "Urban1k" / "caption").mkdir()
    (home / "Urban1k" / "caption" / "1.txt").write_text("a street")
    monkeypatch.setenv("UNIME_EVAL_DIR", str(home))
    tasks = [SugarCrepeByCategory(), CAPTION_TASKS[-1]()]
    first, second = (mteb.evaluate(Noisy(), tasks, cache=None) for _ in range(2))
    for one, other in zip(first, second):
        assert one.dataset_revision == other.dataset_revision and one.dataset_revision.startswith("local-")
        subsets = [{row["hf_subset"] for row in found.scores["test"]} for found in (one, other)]
        assert subsets[0] == subsets[1] and all(one.dataset_revision in subset for subset in subsets[0])
