"""`top_k` equals a float64 brute-force search."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_devices import pretended_devices

from unime_st.retrieval import paired_similarity, top_k


def brute_force(queries, corpus, k, ceiling=None, exclude=None):
    scores = np.full((len(queries), k), -np.inf)
    indices = np.full((len(queries), k), -1)
    for row, query in enumerate(queries.astype(np.float64)):
        similarity = (corpus.astype(np.float64) * query).sum(-1)
        allowed = np.ones(len(corpus), dtype=bool) if ceiling is None else similarity < ceiling[row]
        allowed[list(exclude[row]) if exclude is not None else []] = False
        positions = np.flatnonzero(allowed)
        positions = positions[np.lexsort((positions, -similarity[positions]))][:k]
        scores[row, : len(positions)], indices[row, : len(positions)] = similarity[positions], positions
    return scores, indices


def unit(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    values = rng.standard_normal((count, width)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def check(found, expected) -> None:
    assert found[0].dtype == np.float32 and found[1].dtype == np.int64
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("query_chunk", "corpus_chunk"), [(1024, 16384), (7, 13), (1, 31)])
def test_equals_brute_force(query_chunk: int, corpus_chunk: int):
    rng = np.random.default_rng(0)
    queries, corpus = unit(rng, 40, 24), unit(rng, 200, 24)
    check(
        top_k(queries, corpus, 10, query_chunk=query_chunk, corpus_chunk=corpus_chunk),
        brute_force(queries, corpus, 10),
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 40), st.integers(1, 9))
def test_ties_ceilings_and_exclusions(seed: int, k: int, size: int, chunk: int):
    rng = np.random.default_rng(seed)
    distinct = unit(rng, 4, 5)
    corpus = distinct[rng.integers(0, 4, size)]  # nearly everything is tied
    queries = np.concatenate([unit(rng, 3, 5), distinct])
    ceiling = paired_similarity(queries, corpus[rng.integers(0, size, len(queries))])
    exclude = [rng.choice(size, rng.integers(0, size + 1), replace=False).tolist() for _ in queries]
    found = top_k(
        queries, corpus, k, max_similarity=ceiling, exclude=exclude, query_chunk=chunk, corpus_chunk=chunk + 1
    )
    check(found, brute_force(queries, corpus, k, ceiling, exclude))


@pytest.mark.parametrize("ceiling", [None, 0.3, -0.01, -0.95])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_more_blocks_than_one_with_duplicates(kind: type, ceiling: float | None):
    rng = np.random.default_rng(4)
    queries, corpus = unit(rng, 9, 16).astype(kind), unit(rng, 5000, 16).astype(kind)
    corpus[rng.integers(0, 5000, 900)] = corpus[7]
    corpus[4000:4040] = queries[0]
    exclude = [rng.integers(0, 5000, 40).tolist() for _ in queries]
    limits = None if ceiling is None else np.full(9, ceiling)
    found = top_k(queries, corpus, 12, max_similarity=limits, exclude=exclude, query_chunk=4, corpus_chunk=2500)
    check(found, brute_force(queries, corpus, 12, limits, exclude))


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e15, 1e21])
def test_what_float32_cannot_hold(scale: float):
    rng = np.random.default_rng(5)
    queries, corpus = unit(rng, 5, 8) * np.float64(scale), unit(rng, 300, 8) * np.float64(scale)
    _, indices = top_k(queries, corpus, 4, corpus_chunk=90)
    np.testing.assert_array_equal(indices, brute_force(queries, corpus, 4)[1])


def test_many_duplicates_of_the_positive_are_below_no_ceiling():
    rng = np.random.default_rng(1)
    positive = unit(rng, 1, 512)
    corpus = np.concatenate([np.repeat(positive, 700, axis=0), unit(rng, 300, 512)])
    query = unit(rng, 1, 512) + positive
    _, indices = top_k(query, corpus, 5, max_similarity=paired_similarity(query, positive), corpus_chunk=97)
    assert (indices >= 700).all()


def test_near_ties_that_float32_cannot_tell_apart():
    rng = np.random.default_rng(2)
    base = unit(rng, 1, 64)
    corpus = (base + rng.standard_normal((500, 64)) * 1e-7).astype(np.float32)
    check(top_k(base, corpus, 9), brute_force(base, corpus, 9))


def test_padding_when_there_are_too_few():
    scores, indices = top_k(np.eye(3), np.eye(3)[:2], 4, exclude=[[0], [0, 1], []])
    assert indices.tolist() == [[1, -1, -1, -1], [-1] * 4, [0, 1, -1, -1]]
    assert np.isneginf(scores[indices == -1]).all() and np.isfinite(scores[indices >= 0]).all()


def test_scalar_ceiling_empty_corpus_and_tensors():
    assert top_k(np.eye(2), np.eye(2), 1, max_similarity=1.0)[1].tolist() == [[1], [0]]
    assert top_k(np.eye(2), np.zeros((0, 2)), 2)[1].tolist() == [[-1, -1], [-1, -1]]
    assert top_k(np.zeros((0, 2)), np.eye(2), 2)[0].shape == (0, 2)
    assert top_k(torch.eye(2, dtype=torch.bfloat16), torch.eye(2), 1)[1].tolist() == [[0], [1]]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="k must be at least 1"):
        top_k(np.eye(2), np.eye(2), 0)
    with pytest.raises(ValueError, match="dimensions"):
        top_k(np.eye(2), np.eye(3), 1)
    with pytest.raises(ValueError, match="queries: 1 vectors are not finite, the first at position 1"):
        top_k(np.array([[1.0, 0.0], [np.nan, 0.0]]), np.eye(2), 1)
    with pytest.raises(ValueError, match="exclude has 1 lists for 2 queries"):
        top_k(np.eye(2), np.eye(2), 1, exclude=[[]])


def test_memory_maps(tmp_path):
    rng = np.random.default_rng(3)
    corpus = unit(rng, 50, 8)
    np.save(tmp_path / "corpus.npy", corpus)
    check(top_k(corpus, np.load(tmp_path / "corpus.npy", mmap_mode="r"), 3), brute_force(corpus, corpus, 3))
    check(top_k(corpus[:, ::2], np.asfortranarray(corpus[:, ::2]), 3), brute_force(corpus[:, ::2], corpus[:, ::2], 3))


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "block by block"])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_a_device_finds_the_same(kind: type, resident: bool, monkeypatch: pytest.MonkeyPatch):
    """Arrays and tensors of the device, with duplicates, near ties, limits that are similarities, and exclusions."""
    rng = np.random.default_rng(6)
    queries, corpus = unit(rng, 9, 16).astype(kind), unit(rng, 900, 16).astype(kind)
    corpus[100:160] = corpus[7]
    corpus[200:300] = (corpus[8] + rng.standard_normal((100, 16)) * 1e-7).astype(kind)
    queries[0] = corpus[7]
    limits = paired_similarity(queries, corpus[:9])
    exclude = [rng.integers(0, 900, 40).tolist() for _ in queries]
    monkeypatch.setattr(sys.modules[top_k.__module__], "_DEVICE_BYTES", 4 * 9 * 400)  # several blocks
    with nullcontext() if torch.cuda.is_available() else pretended_devices():
        if not resident:
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *args: (0, 0))
        sides: list[tuple[Any, ...]] = [(queries, corpus)]
        sides += [tuple(torch.tensor(side, device="cuda") for side in sides[0])] if resident else []
        for left, right in sides:
            for limit, excluded in ((None, None), (limits, exclude)):
                found = top_k(left, right, 12, max_similarity=limit, exclude=excluded, corpus_chunk=100, device="cuda")
                check(found, brute_force(queries, corpus, 12, limit, excluded))
            with pytest.raises(ValueError, match="corpus: 1 vectors are not finite, the first at position 3"):
                spoiled = right * 1
                spoiled[3, 0] = np.nan
                top_k(left, spoiled, 2, device="cuda")
