"""Two-stage models in mteb: reranking of the first stage's top k."""

from __future__ import annotations

import json
import logging

import mteb
import numpy as np
import pytest

from mteb_tasks import TwoStage, evaluate, wrap
from mteb_tasks.metadata import model_meta
from mteb_tasks.models import load_two_stage, metas
from mteb_tasks.scenes import ScenesCompositional, ScenesShortT2IRetrieval, ScenesVQA
from mteb_tasks.sugarcrepe import SugarCrepeByCategory


class Oracle:
    """A judge that knows the right answers: shows that the second stage decides, among what the first one found."""

    name, revision, prompt_hash = "oracle", "1", ""

    def __init__(self, task):
        data = task.retrieval_data("default", "test")
        self.lists = 0
        self.right = {
            (data.queries[query].text, data.corpus[document].text)
            for query, documents in data.relevant.items()
            for document in documents
        }

    def listwise_scores(self, query, documents):
        self.lists += 1
        return np.array([30.0 if (query.text, one.text) in self.right else -30.0 for one in documents], np.float32)

    def score(self, groups):
        return [
            np.array([(group.query.text, one.text) in self.right for one in group.candidates], np.float32)
            for group in groups
        ]


@pytest.mark.parametrize("method", ["listwise", "pairwise"])
def test_the_reranker_decides_among_the_top_k(tiny, method):
    task = ScenesVQA(size=25)
    alone = evaluate(tiny, [task])["ScenesVQA"]["default"]
    oracle = Oracle(task)
    both = evaluate(TwoStage(wrap(tiny), oracle, top_k=10, method=method), [task])["ScenesVQA"]["default"]
    assert both["hit_rate_at_1"] == both["hit_rate_at_10"] == alone["hit_rate_at_10"]
    assert both["hit_rate_at_1"] > alone["hit_rate_at_1"]
    assert oracle.lists == (25 if method == "listwise" else 0)


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

    class ReadsCaptions(Oracle):
        def __init__(self):
            self.right = set()

        def score(self, groups):
            assert all(group.query.image is not None and len(group.candidates) == 2 for group in groups)
            return [np.array([one.text in captions for one in group.candidates], np.float32) for group in groups]

    found = evaluate(TwoStage(wrap(tiny), ReadsCaptions()), [task])["ScenesCompositional"]
    assert {scores["text_acc"] for scores in found.values()} == {1.0}


def test_wrong_settings_are_named(tiny):
    with pytest.raises(ValueError, match=r"listwise.*pairwise.*hybrid.*'both'"):
        TwoStage(wrap(tiny), Oracle(ScenesVQA(size=2)), method="both")
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        TwoStage(wrap(tiny), Oracle(ScenesVQA(size=2)), top_k=0)
    with pytest.raises(ValueError, match=r"expected method='pairwise', got 'listwise'"):
        TwoStage(wrap(tiny), Oracle(ScenesVQA(size=2)), alpha=20.0)
    with pytest.raises(ValueError, match="Oracle has no pair_order to choose"):
        TwoStage(wrap(tiny), Oracle(ScenesVQA(size=2)), method="pairwise", pair_order="both")


@pytest.mark.slow
def test_fusion_and_pair_order_reach_the_ranking_and_the_name_of_the_results(tiny, monkeypatch):
    from unime_st import UniMEReranker
    from unime_st.judging import LocalJudge

    class Doubtful(Oracle):
        def score(self, groups):
            return [1e-4 * scores for scores in super().score(groups)]

    task = ScenesVQA(size=25)
    alone = evaluate(tiny, [task])["ScenesVQA"]["default"]
    oracle = Doubtful(task)
    decided = evaluate(TwoStage(wrap(tiny), oracle, method="pairwise"), [task])["ScenesVQA"]["default"]
    fused = evaluate(TwoStage(wrap(tiny), oracle, method="pairwise", alpha=1e6), [task])["ScenesVQA"]["default"]
    assert decided["hit_rate_at_1"] == alone["hit_rate_at_10"]
    assert fused["hit_rate_at_1"] == alone["hit_rate_at_1"] < decided["hit_rate_at_1"]
    reranker = UniMEReranker("unime-tiny", template="tiny")
    both = TwoStage(wrap(tiny), reranker, method="pairwise", pair_order="both", alpha=20.0)
    assert both.mteb_model_meta.experiment_kwargs["pair_order"] == "both"
    assert both.mteb_model_meta.experiment_kwargs["alpha"] == 20.0
    assert isinstance(both.judge, LocalJudge) and both.judge.pair_order == "both"
    monkeypatch.setenv("UNIME_RERANKER", "unime-tiny")
    assert load_two_stage("unime/unime-tiny+reranker", device="cpu").alpha is None
    monkeypatch.setenv("UNIME_FUSION_ALPHA", "20")
    monkeypatch.setenv("UNIME_PAIR_ORDER", "candidate_first")
    loaded = load_two_stage("unime/unime-tiny+reranker", device="cpu")
    assert isinstance(loaded.judge, LocalJudge)
    assert (loaded.alpha, loaded.method, loaded.judge.pair_order) == (20.0, "pairwise", "candidate_first")
    described = metas()["unime-tiny+reranker"]
    assert described.experiment_kwargs == {"alpha": 20.0, "pair_order": "candidate_first"}
    assert described.load_model(device="cpu").mteb_model_meta.experiment_kwargs == described.experiment_kwargs
    given = load_two_stage("unime/unime-tiny+reranker", device="cpu", alpha=3.0)
    assert given.mteb_model_meta.experiment_kwargs["alpha"] == 3.0
    monkeypatch.setenv("UNIME_FUSION_ALPHA", "much")
    with pytest.raises(ValueError, match="UNIME_FUSION_ALPHA must be a number, got 'much'"):
        load_two_stage("unime/unime-tiny+reranker", device="cpu")
    monkeypatch.delenv("UNIME_FUSION_ALPHA")
    monkeypatch.delenv("UNIME_PAIR_ORDER")
    assert metas()["unime-tiny+reranker"].experiment_kwargs is None


@pytest.mark.parametrize(("method", "window"), [("listwise", 10), ("listwise", 4), ("hybrid", 4)])
@pytest.mark.slow
def test_a_real_reranker_reorders_all_ten(tiny, caplog, method, window):
    from unime_st import UniMEReranker

    task = ScenesVQA(size=4)
    reranker = UniMEReranker("unime-tiny", template="tiny")
    model = TwoStage(wrap(tiny), reranker, method=method, window=window)
    with caplog.at_level(logging.INFO, "mteb_tasks"):
        found = evaluate(model, [task, ScenesCompositional(size=2)] if window == 10 else [task])
    assert "reranking took, per query" in caplog.text
    before, after = (caplog.text.index(told) for told in ("queries to rerank: ", "reranking took"))
    assert before < after
    alone = evaluate(tiny, [task])["ScenesVQA"]["default"]
    assert found["ScenesVQA"]["default"]["hit_rate_at_10"] == alone["hit_rate_at_10"]
    if window == 10:
        categories = len(found["ScenesCompositional"])
        assert f"ScenesCompositional: {2 * 2 * categories} pairs of image and text to judge: " in caplog.text
        assert all(0 <= scores["text_acc"] <= 1 for scores in found["ScenesCompositional"].values())


def test_two_stages_are_filed_under_a_name_of_their_own(tiny):
    model = TwoStage(wrap(tiny, "unime/x"), Oracle(ScenesVQA(size=2)))
    assert model.mteb_model_meta.name == "unime/x+reranker"
    for modalities in (["text", "image", "video"], ["text", "image"]):  # this reranker takes videos
        model.embedder.mteb_model_meta = model_meta("unime/x", "1", modalities=modalities)
        assert model.mteb_model_meta.modalities == modalities
    assert ScenesShortT2IRetrieval.metadata.main_score == "hit_rate_at_1"


class Recorder:
    """A judge that keeps what it is asked about."""

    name, revision, prompt_hash = "recorder", "1", ""

    def __init__(self):
        self.items = []

    def listwise_scores(self, query, documents):
        self.items += [query, *documents]
        return np.zeros(len(documents), np.float32)

    def score(self, groups):
        return [self.listwise_scores(group.query, group.candidates) for group in groups]


@pytest.mark.parametrize("name", ["Flickr30k1kI2TRetrieval", "Flickr30k1kT2IRetrieval", "SugarCrepeByCategory"])
def test_the_reranker_reads_the_embedder_s_prompt_beside_a_image(released, official, tmp_path, monkeypatch, name):
    monkeypatch.setenv("UNIME_EVAL_DIR", str(official / "eval"))
    monkeypatch.setenv("UNIME_HOME", str(tmp_path))
    recorder = Recorder()
    evaluate(TwoStage(wrap(released), recorder), [type(mteb.get_task(name))()])
    texts = {item.text for item in recorder.items if item.image is not None}
    assert texts == {" Find an image caption describing the given image."}


@pytest.mark.slow
def test_both_stages_give_the_authors_scores(released, official, tmp_path, monkeypatch):
    from unime_st.checkpoints import convert

    reranker = convert(
        official / "checkpoints" / "tiny-reranker-qwen25vl", "unime-v2-reranker", output=tmp_path / "reranker"
    )
    embedder = tmp_path / "embedder"
    released.save_pretrained(str(embedder))
    for variable, value in {
        "MODEL": embedder,
        "RERANKER": reranker,
        "EVAL_DIR": official / "eval",
        "HOME": tmp_path,
    }.items():
        monkeypatch.setenv(f"UNIME_{variable}", str(value))
    model = load_two_stage("unime/unime-local+reranker", device="cpu")
    scores = evaluate(model, [SugarCrepeByCategory()], tmp_path / "out")["SugarCrepeByCategory"]
    saved = json.loads((tmp_path / "out" / "SugarCrepeByCategory_predictions.json").read_text())
    authors = json.loads((official / "eval/official_results/rerank_sugarcrepe.json").read_text())["subsets"]
    assert len(scores) == len(authors)
    for subset in scores:
        found = [pair[name] for pair in saved[subset]["test"].values() for name in ("caption", "negative_caption")]
        expected = authors[subset.split("-")[0]]["pos_neg_interleaved_scores"]
        # The authors' scores passed through generate's repetition penalty, which divides positive logits by 1.05.
        np.testing.assert_allclose(1 / (1 + np.exp(-np.array(found) / 1.05)), expected, atol=1e-5)
