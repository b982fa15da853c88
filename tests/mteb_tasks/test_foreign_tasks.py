"""Other people's mteb tasks with our loader and with two-stage models."""

from __future__ import annotations

import mteb
import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from mteb_tasks import TwoStage, wrap
from tests.mteb_tasks.foreign import ForeignRetrieval, ForeignSTS
from unime_st import UniMEReranker

PROMPTS = {"query": "a blue star left of a ring, a blue star, a blue star: ", "document": ""}


class WithBlanks(ForeignRetrieval):
    def load_data(self, *args, **kwargs):
        super().load_data()
        split = self.dataset["default"]["test"]
        extra = Dataset.from_dict({"id": ["d3", "d4"], "text": ["", "  "], "title": ["", "a ring"]})
        split["corpus"] = Dataset.from_list([*split["corpus"], *extra])


class OnlyBlanks(ForeignSTS):
    def load_data(self, *args, **kwargs):
        super().load_data()
        columns = {**self.dataset["test"].to_dict(), "sentence1": ["", " ", "", "a ring"]}
        self.dataset = {"test": Dataset.from_dict(columns)}


@pytest.fixture(scope="module")
def plain():
    return SentenceTransformer("unime-tiny", device="cpu")


def scores(model, task):
    result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    (row,) = result.task_results[0].scores["test"]
    return {name: value for name, value in row.items() if isinstance(value, float)}


@pytest.mark.parametrize("task", [ForeignSTS, ForeignRetrieval, WithBlanks, OnlyBlanks])
def test_our_loader_scores_as_mteb_s_own_wrapper(plain, task):
    assert scores(wrap(plain), task()) == pytest.approx(scores(plain, task()), abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("options", [{"prompts": PROMPTS}, {"prompts": PROMPTS, "default_prompt_name": "query"}])
@pytest.mark.parametrize("task", [ForeignSTS, ForeignRetrieval])
def test_prompts_follow_mteb_s_rules(task, options):
    model = SentenceTransformer("unime-tiny", device="cpu", **options)
    expected = scores(model, task())
    assert scores(wrap(model), task()) == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_two_stages_read_mteb_s_columns(plain):
    reranker = UniMEReranker("unime-tiny", template="tiny", device="cpu")
    for method in ("pairwise", "listwise"):
        found = scores(TwoStage(wrap(plain), reranker, method=method), WithBlanks())
        assert 0 < found["ndcg_at_10"] <= 1


def test_the_oracle_of_the_second_stage_decides(plain):
    class Oracle:
        name, revision, prompt_hash = "oracle", "1", ""

        def score(self, groups, *, errors=None):
            right = {"red circle": "a red circle", "left ring": "the ring on the left"}
            return [
                np.array([one.text == right[group.query.text] for one in group.candidates], np.float32)
                for group in groups
            ]

    assert scores(TwoStage(wrap(plain), Oracle(), method="pairwise"), WithBlanks())["hit_rate_at_1"] == 1
