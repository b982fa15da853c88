"""Search in two stages on real tiny models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_reranker as tiny
from PIL import Image
from sentence_transformers import CrossEncoder
from tiny_embedder import tiny_embedder

from unime_st import Item, UniME, UniMEReranker
from unime_st.data import BadImageError, RecordSet
from unime_st.data.scenes import training_records
from unime_st.judging import Group, LocalJudge
from unime_st.reranking import search
from unime_st.reranking.fusion import fit_alpha, fit_fusion
from unime_st.reranking.parsing import to_item
from unime_st.reranking.search import rerank_hits
from unime_st.retrieval import Index

QUERIES = ["a red square", {"image": tiny.make_image(0), "text": "which one"}, Item(image=tiny.png(3))]
CORPUS = [f"a {size} {shape}" for size in ("big", "small", "red") for shape in ("square", "circle")] + [
    Item(image=tiny.png(seed)) for seed in range(4)
]


def test_nearest_by_embedding_in_the_order_of_the_reranker(reranker: UniMEReranker):
    embedder = tiny_embedder()
    found = search(QUERIES, CORPUS, embedder, reranker, top_k=4)
    plain = [[value.to_input() if isinstance(value, Item) else value for value in side] for side in (QUERIES, CORPUS)]
    vectors = [embedder.encode([{"text": v} if isinstance(v, str) else v for v in side]) for side in plain]
    similarity = vectors[0] @ vectors[1].T
    for row, entries in enumerate(found):
        nearest = set(np.argsort(-similarity[row])[:4].tolist())
        assert {entry["corpus_id"] for entry in entries} == nearest
        ranking = reranker.rank(plain[0][row], [plain[1][entry["corpus_id"]] for entry in entries])
        assert [entry["corpus_id"] for entry in ranking] == [0, 1, 2, 3]
        for entry, ranked in zip(entries, ranking):
            assert entry["score"] == pytest.approx(ranked["score"], abs=1e-5)
            assert entry["similarity"] == pytest.approx(similarity[row, entry["corpus_id"]], abs=1e-5)


def test_a_judge_serves_as_reranker(reranker: UniMEReranker):
    judge = LocalJudge(reranker, batch_size=3)
    first, second = (search(QUERIES, CORPUS, tiny_embedder(), model, top_k=3) for model in (judge, reranker))
    assert [[e["corpus_id"] for e in row] for row in first] == [[e["corpus_id"] for e in row] for row in second]


@pytest.mark.parametrize("method", ["listwise", "hybrid"])
def test_lists_in_the_second_stage(reranker: UniMEReranker, method: Any, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "unime_st.reranking.search"):
        found = search(QUERIES, CORPUS, tiny_embedder(), reranker, top_k=4, method=method)
    assert "per query" in caplog.text
    for query, entries in zip(QUERIES, found, strict=True):
        nearest = sorted(entries, key=lambda entry: -entry["similarity"])
        expected = reranker.rank(query, [CORPUS[entry["corpus_id"]] for entry in nearest], method=method)
        assert [entry["corpus_id"] for entry in entries] == [nearest[e["corpus_id"]]["corpus_id"] for e in expected]
    with pytest.raises(ValueError, match="ranks pairwise only"):
        search(["a"], ["b"], tiny_embedder(), LocalJudge(reranker), method=method)


def log_odds(reranker: UniMEReranker, query: Any, document: Any) -> float:
    return float(LocalJudge(reranker).score([Group(to_item(query), [to_item(document)])])[0][0])


@pytest.mark.parametrize("order", ["query_first", "candidate_first", "both"])
@pytest.mark.slow
def test_pair_orders_and_fusion(reranker: UniMEReranker, order: Any):
    """alpha * similarity + log-odds, with the two items of a pair in either order."""
    embedder = tiny_embedder()
    alone = search(QUERIES, CORPUS, embedder, reranker, top_k=4, pair_order=order)
    fused = search(QUERIES, CORPUS, embedder, reranker, top_k=4, pair_order=order, alpha=5.0)
    for query, before, after in zip(QUERIES, alone, fused, strict=True):
        scores = {entry["corpus_id"]: entry["score"] for entry in before}
        assert [entry["score"] for entry in after] == sorted((e["score"] for e in after), reverse=True)
        for entry in after:
            document = CORPUS[entry["corpus_id"]]
            ways = [log_odds(reranker, query, document), log_odds(reranker, document, query)]
            odds = {"query_first": ways[0], "candidate_first": ways[1], "both": np.mean(ways)}[order]
            assert entry["score"] == pytest.approx(5.0 * entry["similarity"] + odds, abs=1e-4)
            assert scores[entry["corpus_id"]] == pytest.approx(1 / (1 + np.exp(-odds)), abs=1e-5)
        documents = [CORPUS[entry["corpus_id"]] for entry in before]
        ranked = reranker.rank(query, documents, pair_order=order)
        assert [entry["score"] for entry in ranked] == pytest.approx([e["score"] for e in before], abs=1e-5)
    judged = search(QUERIES, CORPUS, embedder, LocalJudge(reranker), top_k=4, pair_order=order, alpha=5.0)
    assert [[e["corpus_id"] for e in row] for row in judged] == [[e["corpus_id"] for e in row] for row in fused]


def test_reranked_hits_of_an_index(reranker: UniMEReranker):
    embedder = tiny_embedder()
    index = Index.build(CORPUS, embedder, ids=[str(number) for number in range(len(CORPUS))])
    hits = index.search([to_item(query) for query in QUERIES], 4)
    for alpha in (None, 5.0):
        expected = search(QUERIES, CORPUS, embedder, reranker, top_k=4, alpha=alpha)
        found = rerank_hits(QUERIES, hits, reranker, alpha=alpha)
        for ours, theirs in zip(found, expected, strict=True):
            assert [hit.id for hit in ours] == [str(entry["corpus_id"]) for entry in theirs]
            assert [hit.score for hit in ours] == pytest.approx([entry["score"] for entry in theirs], abs=1e-4)


@pytest.mark.slow
def test_alpha_is_the_weight_that_labels_were_drawn_with():
    rng = np.random.default_rng(0)
    similarities, odds = rng.normal(size=(5000, 8)) * 0.1, rng.normal(size=(5000, 8)) * 3
    chances = np.exp(15 * similarities + odds)
    positives = [int(rng.choice(8, p=row / row.sum())) for row in chances]
    assert fit_alpha(similarities, odds, positives) == pytest.approx(15, rel=0.1)
    odds[:, 3] = np.nan  # pairs without a score, of positives as well
    assert fit_alpha(similarities, odds, positives) == pytest.approx(15, rel=0.1)
    with pytest.raises(ValueError, match="do not favor the positives"):
        fit_alpha(similarities, -odds, positives)
    with pytest.raises(ValueError, match="no query has a scored positive"):
        fit_alpha([np.ones(1)], [np.ones(1)], [0])


@pytest.mark.slow
def test_alpha_fitted_on_records(tmp_path: Path):
    """Of the candidates that search finds among the records' positives."""
    reranker, embedder = UniMEReranker("unime-tiny", device="cpu"), UniME("unime-tiny", device="cpu")
    records = RecordSet.write(tmp_path / "records", training_records(60, seed=3), {})
    alpha = fit_fusion(records, embedder, reranker, top_k=6)
    assert 0 <= alpha < 1000
    corpus = [records.item(name) for name in records.positive_ids]
    right: dict[Item, set[Item]] = {}
    for record in records:
        right.setdefault(record.query, set()).add(record.positive)
    found = search(list(right), corpus, embedder, LocalJudge(reranker), top_k=6, alpha=0.0)
    rows = []
    for (_, positives), entries in zip(right.items(), found, strict=True):
        inside = [corpus[entry["corpus_id"]] in positives for entry in entries]
        if sum(inside) == 1:
            rows.append((entries, inside.index(True)))
    cosines, odds = ([np.array([e[key] for e in entries]) for entries, _ in rows] for key in ("similarity", "score"))
    assert alpha == pytest.approx(fit_alpha(cosines, odds, [first for _, first in rows]), rel=0.05)


def test_small_and_repetitive_corpora(reranker: UniMEReranker):
    found = search(["a"], ["b", "c", "b"], tiny_embedder(), reranker, top_k=10)[0]
    assert sorted(entry["corpus_id"] for entry in found) == [0, 1, 2]
    twins = {entry["corpus_id"]: entry["score"] for entry in found}
    assert twins[0] == twins[2]
    assert search([], ["b"], tiny_embedder(), reranker) == []
    assert search(["a"], [], tiny_embedder(), reranker) == [[]]


@pytest.mark.parametrize("method", ["pairwise", "listwise", "hybrid"])
def test_unreadable_documents_are_set_aside(
    reranker: UniMEReranker, method: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Without a vector a document is never found; without an answer it comes last."""
    cut, thin = tmp_path / "cut.png", tmp_path / "thin.png"
    cut.write_bytes(tiny.png(1)[:-60])
    Image.new("RGB", (2, 500)).save(thin)  # longer than image processors take: it gets margins and is found
    corpus = [*CORPUS[:2], Item(image=tmp_path / "none.png"), Image.open(cut), str(thin)]
    found = search(QUERIES, corpus, tiny_embedder(), reranker, top_k=5, method=method)
    assert [sorted(entry["corpus_id"] for entry in row) for row in found] == [[0, 1, 4]] * 3
    assert not any("error" in entry for row in found for entry in row)
    assert "corpus[2] is left out" in caplog.text and "corpus[3] is left out" in caplog.text
    judged = search(QUERIES, corpus, tiny_embedder(), LocalJudge(reranker), top_k=5)
    assert [sorted(entry["corpus_id"] for entry in row) for row in judged] == [[0, 1, 4]] * 3
    with pytest.raises(BadImageError, match=r"queries\[1\]: .*none.png"):
        search(["a", Item(image=tmp_path / "none.png")], corpus, tiny_embedder(), reranker, method=method)


def test_a_text_that_names_an_image_is_the_image(reranker: UniMEReranker, tmp_path: Path):
    path = tmp_path / "image.png"
    path.write_bytes(tiny.png(2))
    found = search([str(path)], ["a", str(path), Item(image=path)], tiny_embedder(), reranker)[0]
    same = {entry["corpus_id"]: entry for entry in found}
    assert same[1]["similarity"] == same[2]["similarity"] == pytest.approx(1, abs=1e-5)
    assert same[1]["score"] == same[2]["score"]


def test_the_cost_is_that_of_the_answers(folder: str, caplog: pytest.LogCaptureFixture):
    """Of a model's first search and of the next: what trying the model takes is not counted."""
    model = UniMEReranker(folder, device="cpu")
    with caplog.at_level(logging.INFO, "unime_st"):
        for other in (model, model, CrossEncoder(modules=list(model), num_labels=1, device="cpu")):
            search(["a", "b"], CORPUS[:4], tiny_embedder(), other, top_k=2)
    costs = [record.getMessage() for record in caplog.records if "per query" in record.getMessage()]
    assert len(costs) == 3 and len(set(costs)) == 1


def test_bad_arguments(reranker: UniMEReranker):
    for alpha in (-1.0, float("nan"), float("inf"), "much"):
        with pytest.raises(ValueError, match="alpha must be a finite number of at least 0"):
            search(["a"], ["b"], tiny_embedder(), reranker, alpha=alpha)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected method='pairwise', got 'listwise'"):
        search(["a"], ["b"], tiny_embedder(), reranker, method="listwise", alpha=1.0)
    with pytest.raises(ValueError, match="pair_order is that of pairwise prompts"):
        search(["a"], ["b"], tiny_embedder(), reranker, method="listwise", pair_order="both")
    with pytest.raises(ValueError, match="pair_order must be one of"):
        reranker.rank("a", ["b"], pair_order="turned")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pair_order='both' needs pairwise prompts"):
        reranker.rank("a", ["b"], pair_order="both", prompt="Which one?")
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        search(["a"], ["b"], tiny_embedder(), reranker, top_k=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        search(["a"], ["b"], tiny_embedder(), reranker, batch_size=0)
    with pytest.raises(TypeError, match=r"corpus\[1\]: .*got int"):
        search(["a"], ["b", 3], tiny_embedder(), reranker)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"queries\[0\]: an empty text"):
        search([""], ["b"], tiny_embedder(), reranker)
    assert search(["a"], [Item(image=b"no image")], tiny_embedder(), reranker) == [[]]
