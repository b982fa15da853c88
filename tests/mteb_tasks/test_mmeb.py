"""MMEB: reading, the official scoring rule, the aggregate, and faulty data."""

from __future__ import annotations

import os
import shutil
import zlib

import mteb
import numpy as np
import pyarrow.parquet as pq
import pytest
from mmeb_rows import rewrite
from noisy_encoder import Noisy
from PIL import Image

from benchmarks.synthetic_mmeb import write_synthetic_mmeb
from mteb_tasks import evaluate, wrap
from mteb_tasks.mmeb import content_digest as fingerprints
from mteb_tasks.mmeb.content_digest import subset_digest
from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.mmeb.subset_reader import read_subset
from mteb_tasks.mmeb.subsets import META_TASKS, SUBSETS, subset_named
from mteb_tasks.mmeb.tasks import MMEB, MMEB_TASKS, mean_scores, mmeb_tasks


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    return write_synthetic_mmeb(tmp_path_factory.mktemp("mmeb"), queries=10, candidates=8, documents=20, side=28)


@pytest.fixture
def data(synthetic, monkeypatch):
    monkeypatch.setenv("MMEB_EVAL_DIR", str(synthetic))
    return synthetic


def test_the_table_has_the_paper_s_counts():
    assert len({subset.name for subset in SUBSETS}) == len({subset.class_name for subset in SUBSETS}) == 36
    assert sum(subset.out_of_domain for subset in SUBSETS) == 16
    assert [sum(subset.meta == meta for subset in SUBSETS) for meta in META_TASKS] == [10, 10, 12, 4]


def official_hits(model, root, subset):
    """The official scorer, written independently: positional, on the rows as they are."""
    rows = pq.read_table(root / subset.name / "test-00000-of-00001.parquet").to_pylist()
    keys = {}
    for row in rows:
        keys.setdefault((row["qry_text"], row["qry_img_path"]))
        keys.update(dict.fromkeys(zip(row["tgt_text"], row["tgt_img_path"])))
    from unime_st.data.items import Item

    items = [Item(text=text, image=root / "images" / image if image else None) for text, image in keys]
    vectors = dict(zip(keys, model.encode([_prepared(item) for item in items], batch_size=16)))
    hits, clear = [], []
    for row in rows:
        listed = list(zip(row["tgt_text"], row["tgt_img_path"]))
        scores = np.stack([vectors[key] for key in listed]) @ vectors[row["qry_text"], row["qry_img_path"]]
        best = listed[int(np.argmax(scores))]
        hits.append(best == listed[0])
        clear.append(np.diff(np.sort(np.unique(scores))[-2:])[0] > 1e-5)
    return np.array(hits), np.array(clear)


def _prepared(item):
    row = item.to_input()
    row["text"] = row["text"].replace("<|image_1|>", "").removeprefix("\n") if "text" in row else None
    return row


@pytest.mark.slow
def test_every_subset_scores_as_the_official_rule_does(data, tiny):
    tasks = mmeb_tasks()
    assert len(tasks) == 36
    scores = evaluate(tiny, tasks, batch_size=16)
    for task in tasks:
        hits, clear = official_hits(tiny, data, task.subset)
        (found,) = scores[task.metadata.name].values()
        assert clear.all(), f"{task.subset.name}: a near tie, choose another seed"
        assert found["hit_rate_at_1"] == pytest.approx(hits.mean(), abs=1e-5), task.subset.name


def test_v2_fields_give_the_strings_of_v1(data, tmp_path):
    other = write_synthetic_mmeb(tmp_path, queries=4, candidates=4, documents=9, side=28, layout="v2")
    same = write_synthetic_mmeb(tmp_path / "v1", queries=4, candidates=4, documents=9, side=28)
    for subset in SUBSETS:
        if subset.stray_token or subset.name == "VisDial":
            continue  # V2 removed the stray token; VisDial's body ends with its own line break in the real data
        first, second = read_subset(same, subset), read_subset(other, subset)
        assert second.query_texts == first.query_texts, subset.name
        strip = subset.name == "RefCOCO-Matching"  # VLM2Vec-V2 ends these crops with a line break
        texts = [text.rstrip("\n") if strip else text for text in second.document_texts]
        assert texts == first.document_texts, subset.name


def test_foreign_models_read_bodies_without_the_official_instruction(data):
    task = next(task for task in mmeb_tasks() if task.subset.name == "OK-VQA")
    task.load_data()
    (split,) = task.dataset.values()
    row = split["test"]["queries"][0]
    assert row["official_text"] == (
        f"<|image_1|>\nRepresent the given image with the following question: {row['text']}\n"
    )
    assert len(row["text"].split()) == 4 and row["image"].size == (28, 28)
    assert task.metadata.prompt == {"query": "Represent the given image with the following question:"}
    found = mteb.evaluate(Noisy(), [task], cache=None)[0]
    assert 0 <= found.get_score() <= 0.6


@pytest.mark.slow
def test_the_aggregate_averages_as_the_papers_do(data, tiny):
    task = MMEB()
    result = mteb.evaluate(Noisy(), task, cache=None)
    (scores,) = result[0].scores["test"]
    assert scores["num_tasks"] == 36 and scores["left_out"] == []
    parts = {name: scores[name] for name in ("mean", "ind", "ood", *META_TASKS)}
    assert parts["mean"] == pytest.approx((20 * parts["ind"] + 16 * parts["ood"]) / 36)
    weighted = (
        10 * parts["classification"] + 10 * parts["vqa"] + 12 * parts["retrieval"] + 4 * parts["grounding"]
    ) / 36
    assert parts["mean"] == pytest.approx(weighted) == scores["main_score"]


def test_chance_is_the_mean_of_one_in_candidates(data, tiny):
    task = next(task for task in mmeb_tasks() if task.subset.name == "NIGHTS")
    (found,) = evaluate(tiny, [task])["MMEB-NIGHTS"].values()
    rows = pq.read_table(data / "NIGHTS" / "test-00000-of-00001.parquet").to_pylist()
    distinct = [len(set(zip(row["tgt_text"], row["tgt_img_path"]))) for row in rows]
    assert found["chance"] == pytest.approx(np.mean([1 / number for number in distinct]))


def _scores_of(tiny, tasks, vector_of):
    """Mean score over tasks of a model whose vectors follow a rule, and what chance would give."""
    loader = wrap(tiny, "unime/planted")
    loader.embed = lambda windows, **_: np.stack([vector_of(item) for items in windows for item in items])
    found = [row for scores in evaluate(loader, tasks).values() for row in scores.values()]
    return [np.mean([row[name] for row in found]) for name in ("hit_rate_at_1", "chance")]


@pytest.mark.slow
def test_random_constant_and_perfect_models_get_what_they_deserve(data, tiny):
    tasks = mmeb_tasks()
    rng = np.random.default_rng(0)
    score, chance = _scores_of(tiny, tasks, lambda item: rng.normal(size=8).astype(np.float32))
    spread = 3 * np.sqrt(chance * (1 - chance) / (36 * 10))
    assert 0.1 < chance < 0.2 and abs(score - chance) < spread
    score, _ = _scores_of(tiny, tasks, lambda item: np.ones(4, np.float32))
    assert score < chance + spread  # the positive stands first in every list, which must not help
    right = {}
    for task in tasks:
        (subset,) = task.hf_subsets
        found = task.retrieval_data(subset, "test")
        right |= {item.id: found.corpus[min(found.relevant[query])].id for query, item in found.queries.items()}

    def perfect(item):
        return np.random.default_rng(zlib.crc32(right.get(item.id, item.id).encode())).normal(size=64)

    score, _ = _scores_of(tiny, tasks, lambda item: (v := perfect(item)) / np.linalg.norm(v))
    assert score == 1.0


def test_means_of_a_part_are_means_of_that_part():
    assert mean_scores({"OK-VQA": 0.5, "GQA": 0.75})["vqa"] == 0.625
    assert "grounding" not in mean_scores({"OK-VQA": 0.5})


def test_changed_data_are_never_scored_from_an_old_result(one, tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("MMEB_ALLOW_MISSING", "1")
    cache = mteb.ResultCache(tmp_path / "results")
    first, again = (dict(mteb.evaluate(Noisy(), MMEB(), cache=cache)[0].scores["test"][0]) for _ in range(2))
    assert again.pop("left_out") == first.pop("left_out")
    numbers = {name for name, value in first.items() if isinstance(value, float)}
    assert "mean" in numbers  # mteb rounds the numbers that it writes
    assert again == {**first, **{name: pytest.approx(first[name], abs=1e-6) for name in numbers}}
    stale = MMEB()
    rewrite(one, lambda rows: rows.pop(), name="CIRR")
    changed = mteb.evaluate(Noisy(), MMEB(), cache=cache)[0].scores["test"][0]
    assert changed["hf_subset"] != first["hf_subset"]
    with pytest.raises(MMEBDataError, match="has changed"):
        stale.tasks[0].load_data()


@pytest.mark.parametrize("zipped", [False, True])
def test_a_image_of_the_same_size_in_bytes_is_other_data(tmp_path, monkeypatch, zipped):
    root = write_synthetic_mmeb(
        tmp_path, subsets=[subset_named("CIRR"), subset_named("OVEN")], queries=2, candidates=2
    )
    image = root / "images" / "Shared" / "deep" / "a.bmp"
    image.parent.mkdir(parents=True)
    rewrite(root, lambda rows: rows[0].update(qry_img_path="Shared/deep/a.bmp"), name="CIRR")

    def found():
        if zipped:
            shutil.make_archive(str(root / "images"), "zip", root, "images")
            (root / "images").rename(root / "aside")
        try:
            return [subset_digest(root, name) for name in ("CIRR", "OVEN")]
        finally:
            if zipped:
                (root / "aside").rename(root / "images")

    def paint(color):
        Image.new("RGB", (8, 8), color).save(image)

    paint("red")
    first = found()
    assert found() == first
    before = image.stat()
    paint("blue")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))  # as tools that copy do
    second = found()
    assert second[0] != first[0] and second[1] == first[1]
    monkeypatch.setattr(fingerprints, "_hash", lambda file: pytest.fail(f"{file} was read again"))
    assert found() == second


def test_the_first_unime_reads_mmeb_in_its_own_style_and_other_sets_in_one_word(one, tmp_path_factory):
    from sentence_transformers import SentenceTransformer
    from tiny_checkpoints import llava_next

    from mteb_tasks.columns import to_dataset
    from unime_st.checkpoints import convert

    root = tmp_path_factory.mktemp("v1")
    source = llava_next(root)
    folder = convert(source, "unime-v1-llava1.6", output=root / "made", image_size=56)
    model = SentenceTransformer(str(folder), device="cpu")
    task = next(task for task in MMEB_TASKS if task.subset.name == "CIRR")()
    task.load_data()
    (split,) = task.dataset.values()
    data = task.retrieval_data(task.hf_subsets[0], "test")
    loader = wrap(model)
    rows = [item.to_input() for item in data.queries.values()]
    bare = model.encode(rows, processing_kwargs={"chat_template": {"style": "mmeb"}})
    table = split["test"]["queries"]
    np.testing.assert_allclose(loader.encode(_loader_of(table), **_CONTEXT), bare, atol=1e-5)
    one_word = loader.encode(_loader_of(to_dataset(data.queries, ["text", "image"])), **_CONTEXT)
    np.testing.assert_allclose(one_word, model.encode(rows), atol=1e-5)
    assert np.abs(one_word - bare).max() > 1e-2


_CONTEXT = {"task_metadata": None, "hf_split": "test", "hf_subset": "default"}


def _loader_of(table):
    from torch.utils.data import DataLoader

    return DataLoader(table, batch_size=4)


def test_images_in_an_archive_are_unpacked_once(tmp_path, monkeypatch):
    root = write_synthetic_mmeb(tmp_path, subsets=[subset_named("CIRR")], queries=2, candidates=2, documents=3)
    shutil.make_archive(str(root / "images"), "zip", root / "images")
    shutil.rmtree(root / "images")
    monkeypatch.setenv("MMEB_EVAL_DIR", str(root))
    for _ in range(2):
        task = next(task for task in MMEB_TASKS if task.subset.name == "CIRR")()
        task.load_data()
    assert len(list(root.glob("unpacked-*"))) == 1
