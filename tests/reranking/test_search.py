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

from unime_st import Item, UniMEReranker
from unime_st.data import BadImageError
from unime_st.judging import LocalJudge
from unime_st.reranking import search

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
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        search(["a"], ["b"], tiny_embedder(), reranker, top_k=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        search(["a"], ["b"], tiny_embedder(), reranker, batch_size=0)
    with pytest.raises(TypeError, match=r"corpus\[1\]: .*got int"):
        search(["a"], ["b", 3], tiny_embedder(), reranker)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"queries\[0\]: an empty text"):
        search([""], ["b"], tiny_embedder(), reranker)
    assert search(["a"], [Item(image=b"no image")], tiny_embedder(), reranker) == [[]]
