"""Exact ranking of candidates from embeddings; ties are broken by document id, as mteb does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def tie_order(ids: Sequence[str]) -> np.ndarray:
    """Rank documents for breaking ties: the larger id first, as pytrec_eval does when mteb scores a run.

    A cut at the top k that followed the corpus order instead could favour a positive that stands first.

    Args:
        ids: Document ids in corpus order.

    Returns:
        int64 array ``(len(ids),)``: position of each document when sorted by descending id.

    Example:
        >>> tie_order(["a", "c", "b"]).tolist()
        [2, 0, 1]
    """
    order = np.empty(len(ids), dtype=np.int64)
    order[sorted(range(len(ids)), key=ids.__getitem__, reverse=True)] = np.arange(len(ids))
    return order


def rank_candidates(
    queries: np.ndarray,
    documents: np.ndarray,
    candidates: Sequence[np.ndarray] | None,
    ties: np.ndarray,
    k: int,
    *,
    chunk: int = 256,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Find the k most similar candidates of each query.

    One matrix product per `chunk` of queries replaces a product per query; only the listed candidates compete.

    Args:
        queries: float32 ``(num_queries, dim)``, unit rows for cosine.
        documents: float32 ``(num_documents, dim)``.
        candidates: For each query the document rows that compete; None lets every document compete.
        ties: Rank of each document among equals, from `tie_order`.
        k: Number of documents to keep.
        chunk: Queries scored at once; bounds memory to ``chunk * num_documents`` floats.

    Returns:
        For each query the document rows, best first, and their float32 scores.

    Raises:
        ValueError: If a score is not a number (a model that produces NaN must not be ranked).

    Example:
        >>> eye = np.eye(3, dtype=np.float32)
        >>> rows, scores = rank_candidates(eye[:1], eye, None, tie_order(["a", "b", "c"]), 2)[0]
        >>> rows.tolist(), scores.tolist()
        ([0, 2], [1.0, 0.0])
    """
    everything = np.arange(len(documents))
    ranked: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(queries), chunk):
        block = queries[start : start + chunk] @ documents.T
        invalid = np.isnan(block).any(axis=1)
        for offset, row in enumerate(block):
            if invalid[offset]:
                raise ValueError(
                    f"the similarity of query {start + offset} with {int(np.isnan(row).sum())} documents is NaN: "
                    "the model produced invalid embeddings (try float32)"
                )
            pool = everything if candidates is None else candidates[start + offset]
            ranked.append(_best(row[pool], pool, ties, k))
    return ranked


def _best(scores: np.ndarray, pool: np.ndarray, ties: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    if len(scores) > k:
        # Keep everything level with the k-th score: the tie rule, not the partition, decides who stays.
        bound = np.partition(scores, len(scores) - k)[len(scores) - k]
        keep = np.flatnonzero(scores >= bound)
        scores, pool = scores[keep], pool[keep]
    order = np.lexsort((ties[pool], -scores))[:k]
    return pool[order], scores[order]
