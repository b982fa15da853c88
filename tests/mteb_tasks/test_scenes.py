"""The scenes tasks through mteb itself, with a real (random) vision-language embedder and with planted models."""

from __future__ import annotations

import json

import mteb
import numpy as np
import pytest

from mteb_tasks import evaluate, wrap
from mteb_tasks.metadata import model_meta
from mteb_tasks.preference_task import group_means
from mteb_tasks.scenes import SCENES_TASKS, ScenesCompositional, ScenesGrounding, ScenesShortT2IRetrieval, ScenesVQA
from unime_st.encoding import encode_stream

RETRIEVAL = [task for task in SCENES_TASKS if task is not ScenesCompositional]


class Planted:
    """A foreign mteb encoder: no knowledge of our columns, embeddings by a rule on what mteb shows it."""

    def __init__(self, rule, name="planted/model"):
        self.rule, self.mteb_model_meta = rule, model_meta(name, "1")

    def encode(self, inputs, **kwargs):
        return np.concatenate([self.rule(batch) for batch in inputs]).astype(np.float32)

    def similarity(self, a, b):
        return np.asarray(a) @ np.asarray(b).T

    def similarity_pairwise(self, a, b):
        return (np.asarray(a) * np.asarray(b)).sum(axis=1)


def _rows(batch):
    return len(next(iter(batch.values())))


@pytest.mark.parametrize("task", RETRIEVAL, ids=lambda task: task.__name__)
def test_every_retrieval_task_runs_and_ranks_as_numpy_does(tiny, task, tmp_path):
    made = task(size=12)
    scores = evaluate(tiny, [made], tmp_path)[made.metadata.name]["default"]
    split = made.dataset["default"]["test"]
    data = made.retrieval_data("default", "test")
    queries = tiny.encode([item.to_input() for item in data.queries.values()])
    documents = tiny.encode([item.to_input() for item in data.corpus.values()])
    names, hits, gains = list(data.corpus), [], []
    discounts = 1 / np.log2(np.arange(2, 12))
    for row, query in enumerate(data.queries):
        listed, relevant = data.candidates[query] if data.candidates is not None else names, data.relevant[query]
        similar = documents[[names.index(name) for name in listed]] @ queries[row]
        right = [listed[index] in relevant for index in np.argsort(-similar)[:10]]
        hits.append(right[0])
        gains.append(discounts[: len(right)] @ right / discounts[: len(relevant)].sum())
    assert scores["hit_rate_at_1"] == pytest.approx(np.mean(hits), abs=1e-5)
    assert scores["ndcg_at_10"] == pytest.approx(np.mean(gains), abs=1e-5)
    assert scores["main_score"] == scores[made.metadata.main_score]
    ranked = json.loads((tmp_path / f"{made.metadata.name}_predictions.json").read_text())["default"]["test"]
    assert ranked.keys() == set(data.queries) and all(len(found) <= 10 for found in ranked.values())
    assert 0 < scores["chance"] < 0.5
    assert split["queries"].num_rows == 12


def test_texts_reach_the_model_untouched_and_each_item_once(tiny, monkeypatch):
    seen = []

    def noted(model, given, results, **how):
        given = list(given)
        seen.extend(given)
        return encode_stream(model, given, results, **how)

    monkeypatch.setattr("mteb_tasks.item_embedder.encode_stream", noted)
    task = ScenesVQA(size=20)
    evaluate(tiny, [task])
    data = task.retrieval_data("default", "test")
    items = {item.id: item for item in [*data.queries.values(), *data.corpus.values()]}
    assert len(seen) == len(items)
    assert sorted(item.text or "" for item in seen) == sorted(item.text or "" for item in items.values())


def test_a_perfect_foreign_model_scores_one():
    task = ScenesVQA(size=15)
    task.load_data()
    data = task.retrieval_data("default", "test")
    answers = {item.text: row for row, item in enumerate(data.corpus.values())}
    names = list(data.corpus)
    right = {data.queries[query].text: names.index(*docs) for query, docs in data.relevant.items()}
    if len(right) < 15:
        pytest.fail("the questions of this sample repeat: choose another seed")
    eye = np.eye(len(names))
    planted = Planted(lambda batch: eye[[right.get(text, answers.get(text, 0)) for text in batch["text"]]])
    assert mteb.evaluate(planted, task, cache=None)[0].get_score() == 1.0


def test_a_constant_model_is_not_rewarded():
    constant = Planted(lambda batch: np.ones((_rows(batch), 4)))
    found = mteb.evaluate(constant, [ScenesShortT2IRetrieval(size=40), ScenesGrounding(size=40)], cache=None)
    assert all(result.get_score() <= 0.15 for result in found.task_results)
    foils = mteb.evaluate(constant, [ScenesCompositional(size=6)], cache=None)[0]
    assert foils.get_score() == 0.0


def test_compositional_scores_are_strict_comparisons_of_cosines(tiny, tmp_path):
    task = ScenesCompositional(size=8)
    scores = evaluate(tiny, [task], tmp_path)["ScenesCompositional"]
    assert list(scores) == list(task.hf_subsets) and len(scores) == 7
    saved = json.loads((tmp_path / "ScenesCompositional_predictions.json").read_text())
    for category in task.hf_subsets:
        pairs = task.foils(category, "test")
        image, caption, foil = (
            tiny.encode(side)
            for side in (
                [pair.image.to_input() for pair in pairs],
                [{"text": pair.caption} for pair in pairs],
                [{"text": pair.foil} for pair in pairs],
            )
        )
        right, wrong = (image * caption).sum(axis=1), (image * foil).sum(axis=1)
        assert scores[category]["text_acc"] == pytest.approx((right > wrong).mean())
        kept = [row["caption"] for row in saved[category]["test"].values()]
        np.testing.assert_allclose(kept, right, atol=2e-5)


def test_group_means_are_unweighted_over_categories():
    means = group_means({"replace_obj": 0.9, "replace_att": 0.7, "replace_rel": 0.5, "swap_obj": 0.4, "add_att": 1.0})
    assert means == pytest.approx({"replace": 0.7, "swap": 0.4, "add": 1.0, "mean": 0.7})


def test_a_second_model_reuses_the_loaded_data(tiny):
    task = ScenesVQA(size=5)
    evaluate(wrap(tiny, "a/first"), [task])
    tables = task.dataset["default"]["test"]["corpus"]
    evaluate(wrap(tiny, "a/second"), [task])
    assert task.data_loaded and task.dataset["default"]["test"]["corpus"] is tables
