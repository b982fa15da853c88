"""Exact nearest neighbours in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

_RESCORE_BYTES = 2 << 20  # what stays in a core's cache


def paired_similarity(left: Any, right: Any) -> np.ndarray:
    """Dot product of each row of ``left`` with the same row of ``right``.

    :func:`top_k` compares candidates by exactly this arithmetic, so that equal vectors have equal similarities.

    Args:
        left: Array of shape (n, dim).
        right: Array of shape (n, dim).

    Returns:
        np.ndarray: float64 of shape (n,).

    Example:
        >>> from unime_st.retrieval import paired_similarity
        >>> paired_similarity([[1.0, 0.0]], [[0.6, 0.8]])
        array([0.6])
    """
    return np.multiply(left, right, dtype=np.float64).sum(axis=-1)


def top_k(
    queries: Any,
    corpus: Any,
    k: int,
    *,
    max_similarity: float | Sequence[float] | np.ndarray | None = None,
    exclude: Sequence[Sequence[int]] | None = None,
    query_chunk: int = 1024,
    corpus_chunk: int = 8192,
    device: str | torch.device | None = None,
    show_progress_bar: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k most similar corpus vectors of each query, as a float64 brute force would.

    A float32 matrix product proposes a few more than k candidates per query; these are compared in float64, equal
    similarities by corpus position. Where float32 cannot prove that the proposal holds the answer (many near-equal
    vectors), the query is searched again in float64, on which the device must be able to compute. Memory is bounded by
    one block of ``query_chunk`` x ``corpus_chunk`` similarities.

    Args:
        queries: Array or tensor of shape (n, dim).
        corpus: Array or tensor of shape (m, dim); may be a memory map.
        k: Number of neighbours, at least 1.
        max_similarity: Only neighbours with a similarity strictly below this count: one number or one per query.
            Infinity means no ceiling for that query. Defaults to None, no ceiling.
        exclude: Per query the corpus positions that do not count. Defaults to None.
        query_chunk: Queries per block. Defaults to 1024.
        corpus_chunk: Corpus vectors per block. Defaults to 8192.
        device: Where the products are computed. Defaults to None, the CPU.
        show_progress_bar: Show progress over blocks. Defaults to False.

    Returns:
        tuple[np.ndarray, np.ndarray]: Similarities (float32, falling) and corpus positions (int64), both of shape
        (n, k). Where fewer than k neighbours count, the rest is filled with -inf and -1.

    Raises:
        ValueError: If shapes do not fit, k < 1, or a vector is not finite.

    Example:
        >>> from unime_st.retrieval import top_k
        >>> scores, indices = top_k([[1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]], 2, max_similarity=1.0)
        >>> indices, scores
        (array([[2, 0]]), array([[0.6, 0. ]], dtype=float32))
    """
    left, right = _matrix(queries, "queries"), _matrix(corpus, "corpus")
    if k < 1 or left.shape[1] != right.shape[1]:
        raise ValueError(
            f"k must be at least 1 and widths equal; k = {k}, widths {left.shape[1]} and {right.shape[1]}"
        )
    ceiling = np.full(len(left), np.inf) if max_similarity is None else np.asarray(max_similarity, dtype=np.float64)
    ceiling = np.broadcast_to(ceiling, (len(left),))
    if exclude is not None and len(exclude) != len(left):
        raise ValueError(f"exclude has {len(exclude)} lists for {len(left)} queries")
    scores = np.full((len(left), k), -np.inf, dtype=np.float32)
    indices = np.full((len(left), k), -1, dtype=np.int64)
    search = _Search(right, k, corpus_chunk, device)
    starts = range(0, len(left), query_chunk)
    for start in tqdm(starts, desc="searching", unit="block", disable=not show_progress_bar):
        block = slice(start, start + query_chunk)
        hidden = [()] * len(left[block]) if exclude is None else exclude[block]
        for row, (score, index) in enumerate(search.answers(left[block], ceiling[block], hidden), start=start):
            scores[row, : len(score)], indices[row, : len(index)] = score, index
    return scores, indices


class _Search:
    """Searches one corpus for blocks of queries."""

    def __init__(self, corpus: np.ndarray, k: int, chunk: int, device: str | torch.device | None) -> None:
        self.corpus, self.k, self.chunk, self.device = corpus, k, chunk, device
        self.width = k + max(8, k // 4)  # proposals: float32 may put neighbours of rank k a few places lower
        self.starts = range(0, len(corpus), chunk)
        self.longest = max(
            (float(np.linalg.norm(self._block(start), axis=1).max()) for start in self.starts), default=0.0
        )

    def answers(
        self, queries: np.ndarray, ceiling: np.ndarray, exclude: Sequence[Sequence[int]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Search in float32; again in float64 what that cannot decide; one by one what is tied exactly."""
        answers: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for dtype in (torch.float32, torch.float64):
            rows = [row for row in range(len(queries)) if row not in answers]
            if not rows:
                break
            found = self._attempt(queries[rows], ceiling[rows], [exclude[row] for row in rows], dtype)
            answers.update((row, answer) for row, answer in zip(rows, found) if answer is not None)
        for row in set(range(len(queries))) - set(answers):
            answers[row] = self._brute_force(queries[row], ceiling[row], exclude[row])
        return [answers[row] for row in range(len(queries))]

    def _attempt(
        self, queries: np.ndarray, ceiling: np.ndarray, exclude: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """Order proposals in float64; None where a neighbour may be missing from them."""
        # Blocked sums of d products stray by about sqrt(d) roundings; eight times that is a safe margin.
        norms = np.linalg.norm(queries, axis=1).astype(np.float64)
        error = 4 * torch.finfo(dtype).eps * np.sqrt(queries.shape[1]) * norms * self.longest
        best, where = self._propose(queries, ceiling + error, exclude, dtype)
        exact = self._rescore(queries, where, _contenders(best, ceiling, error, self.k))
        result: list[tuple[np.ndarray, np.ndarray] | None] = []
        for row, (proposed, similarity, places) in enumerate(zip(best, exact, where)):
            counts = similarity < ceiling[row]
            score, index = _ordered(similarity[counts], places[counts], self.k)
            everything = len(proposed) == len(self.corpus) or np.isneginf(proposed).any()
            enough = len(score) == self.k and score[-1] > proposed[-1] + error[row]
            result.append((score, index) if everything or enough else None)
        return result

    def _block(self, start: int) -> np.ndarray:
        return self.corpus[start : start + self.chunk]

    def _tensor(self, values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        # A copy, because PyTorch cannot share memory that is read-only.
        return torch.tensor(np.asarray(values), dtype=dtype, device=self.device)

    def _propose(
        self, queries: np.ndarray, bound: np.ndarray, exclude: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best few more than k below the bound by similarity in a precision, best first, and where they are."""
        left = self._tensor(queries, dtype)
        upper = self._tensor(np.minimum(bound, np.finfo(np.float32).max), dtype)[:, None]
        rows, columns = _flatten(exclude)
        best = torch.empty((len(left), 0), dtype=dtype, device=self.device)
        where = torch.empty((len(left), 0), dtype=torch.int64, device=self.device)
        for start, stop in _growing(len(self.corpus), 4 * self.width, self.chunk):
            similarity = left @ self._tensor(self.corpus[start:stop], dtype).T
            inside = (columns >= start) & (columns < stop)
            similarity[rows[inside], columns[inside] - start] = -torch.inf
            found, place = self._better(similarity, upper, best)
            best, where = torch.cat([best, found], 1), torch.cat([where, place + start], 1)
            best, kept = best.topk(min(self.width, best.shape[1]), dim=1)
            where = where.gather(1, kept)
        return best.cpu().numpy().astype(np.float64), where.cpu().numpy()

    def _better(
        self, similarity: torch.Tensor, upper: torch.Tensor, best: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a block adds to the best so far: similarities, padded with -inf, and columns.

        After the first blocks few entries of a row do: to find them costs one comparison of each, a fraction of
        ordering the row.
        """
        if best.shape[1] < self.width:
            return similarity.masked_fill_(similarity > upper, -torch.inf).topk(
                min(self.width, similarity.shape[1]), dim=1
            )
        row, column = (similarity > best[:, -1:]).nonzero(as_tuple=True)
        value = similarity[row, column]
        allowed = value <= upper[row, 0]
        row, column, value = row[allowed], column[allowed], value[allowed]
        counts = row.bincount(minlength=len(similarity))
        position = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        width = int(counts.max()) if len(row) else 0
        found = similarity.new_full((len(similarity), width), -torch.inf)
        place = torch.zeros((len(similarity), width), dtype=torch.int64, device=row.device)
        found[row, position], place[row, position] = value, column
        return found, place

    def _rescore(self, queries: np.ndarray, where: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Similarities in float64 of the chosen places; infinity elsewhere, which is below no ceiling."""
        exact = np.full(where.shape, np.inf)
        rows, columns = np.nonzero(chosen)
        step = max(1, _RESCORE_BYTES // (8 * queries.shape[1]))
        for start in range(0, len(rows), step):
            row, column = rows[start : start + step], columns[start : start + step]
            exact[row, column] = paired_similarity(queries[row], self.corpus[where[row, column]])
        return exact

    def _brute_force(self, query: np.ndarray, ceiling: float, exclude: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        similarity = np.concatenate([paired_similarity(query[None, :], self._block(start)) for start in self.starts])
        counts = similarity < ceiling
        counts[list(exclude)] = False
        return _ordered(similarity[counts], np.flatnonzero(counts), self.k)


def _matrix(values: Any, name: str) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu().numpy()
    matrix = np.asanyarray(values, dtype=None if getattr(values, "dtype", None) == np.float64 else np.float32)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must have shape (n, dim), got {matrix.shape}")
    bad = np.flatnonzero(~np.isfinite(matrix.sum(axis=1, dtype=np.float64)))
    if len(bad):
        raise ValueError(f"{name}: {len(bad)} vectors are not finite, the first at position {bad[0]}")
    return matrix


def _ordered(similarity: np.ndarray, index: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((index, -similarity))[:k]
    return similarity[order], index[order]


def _growing(size: int, first: int, most: int) -> Iterator[tuple[int, int]]:
    """Blocks of a corpus, each four times as long as the one before until they are ``most`` long."""
    start, length = 0, min(first, most)
    while start < size:
        yield start, min(start + length, size)
        start, length = start + length, min(4 * length, most)


def _contenders(proposed: np.ndarray, ceiling: np.ndarray, error: np.ndarray, k: int) -> np.ndarray:
    """Which proposals, best first, can be among the k best below the ceiling if each may be off by ``error``."""
    if not proposed.size:
        return np.zeros(proposed.shape, dtype=bool)
    certain = proposed < (ceiling - error)[:, None]
    enough = certain.cumsum(axis=1) >= k
    kth = np.take_along_axis(proposed, enough.argmax(axis=1)[:, None], axis=1)
    least = np.where(enough[:, -1:], kth - 2 * error[:, None], -np.inf)
    return np.isfinite(proposed) & (proposed >= least)


def _flatten(exclude: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.repeat(np.arange(len(exclude)), [len(hidden) for hidden in exclude])
    columns = np.fromiter((place for hidden in exclude for place in hidden), dtype=np.int64, count=len(rows))
    return rows, columns
