from __future__ import annotations

import numpy as np
import pytest

from mteb_tasks import TwoStage, evaluate, wrap
from mteb_tasks.scenes import ScenesCompositional, ScenesShortT2IRetrieval, ScenesVQA


class Oracle:
    """Knows the right answers: shows that the second stage decides, and only among what the first one found."""

    def __init__(self, task):
        data = task.retrieval_data("default", "test")
        self.asked = 0
        self.right = {
            (data.queries[query].text, data.corpus[document].text)
            for query, documents in data.relevant.items()
            for document in documents
        }

    def listwise_scores(self, query, documents):
        self.asked += 1
        return self.predict([(query, document) for document in documents])

    def predict(self, inputs, **kwargs):
        return np.array([(query["text"], document["text"]) in self.right for query, document in inputs], np.float32)


@pytest.mark.parametrize("method", ["listwise", "pairwise"])
def test_the_reranker_decides_among_the_top_k(tiny, method):
    task = ScenesVQA(size=25)
    alone = evaluate(tiny, [task])["ScenesVQA"]["default"]
    oracle = Oracle(task)
    both = evaluate(TwoStage(wrap(tiny), oracle, top_k=10, method=method), [task])["ScenesVQA"]["default"]
    assert both["hit_rate_at_1"] == both["hit_rate_at_10"] == alone["hit_rate_at_10"]
    assert both["hit_rate_at_1"] > alone["hit_rate_at_1"]
    assert oracle.asked == (25 if method == "listwise" else 0)


def test_documents_below_the_cut_keep_their_place(tiny, tmp_path):
    task = ScenesVQA(size=10)
    alone = evaluate(tiny, [task])["ScenesVQA"]["default"]
    both = evaluate(TwoStage(wrap(tiny), Oracle(task), top_k=3), [task])["ScenesVQA"]["default"]
    assert both["hit_rate_at_5"] == alone["hit_rate_at_5"]
    assert both["hit_rate_at_10"] == alone["hit_rate_at_10"]


def test_compositional_pairs_are_judged_by_the_reranker(tiny):
    task = ScenesCompositional(size=3)
    task.load_data()
    captions = {pair.caption for category in task.hf_subsets for pair in task.foils(category, "test")}

    class ReadsCaptions:
        def listwise_scores(self, query, documents):
            raise AssertionError("pairs are judged one by one")

        def predict(self, inputs, **kwargs):
            assert all(query["image"].mode == "RGB" for query, _ in inputs)
            return [document["text"] in captions for _, document in inputs]

    found = evaluate(TwoStage(wrap(tiny), ReadsCaptions()), [task])["ScenesCompositional"]
    assert {scores["text_acc"] for scores in found.values()} == {1.0}


def test_wrong_settings_are_named(tiny):
    with pytest.raises(ValueError, match="listwise.*pairwise.*'both'"):
        TwoStage(wrap(tiny), Oracle(ScenesVQA(size=2)), method="both")
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        TwoStage(wrap(tiny), Oracle(ScenesVQA(size=2)), top_k=0)


def test_two_stages_are_filed_under_a_name_of_their_own(tiny):
    model = TwoStage(wrap(tiny, "unime/x"), Oracle(ScenesVQA(size=2)))
    assert model.mteb_model_meta.name == "unime/x+reranker"
    assert ScenesShortT2IRetrieval.metadata.main_score == "hit_rate_at_1"
