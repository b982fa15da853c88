"""Search in two stages on real tiny models."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import tiny_reranker as tiny
from tiny_embedder import tiny_embedder

from unime_st import Item, UniMEReranker
from unime_st.data import BadImageError
from unime_st.judging import LocalJudge
from unime_st.reranking import search

QUERIES = ["a red square", {"image": tiny.picture(0), "text": "which one"}, Item(image=tiny.png(3))]
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


def test_small_and_repetitive_corpora(reranker: UniMEReranker):
    found = search(["a"], ["b", "c", "b"], tiny_embedder(), reranker, top_k=10)[0]
    assert sorted(entry["corpus_id"] for entry in found) == [0, 1, 2]
    twins = {entry["corpus_id"]: entry["score"] for entry in found}
    assert twins[0] == twins[2]
    assert search([], ["b"], tiny_embedder(), reranker) == []
    assert search(["a"], [], tiny_embedder(), reranker) == [[]]


def test_bad_arguments(reranker: UniMEReranker):
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        search(["a"], ["b"], tiny_embedder(), reranker, top_k=0)
    with pytest.raises(BadImageError):
        search(["a"], [Item(image=b"no image")], tiny_embedder(), reranker)
