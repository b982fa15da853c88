"""Exact nearest neighbor search (top-k) in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn
from tqdm.auto import tqdm

from unime_st.options import check_count

_RESCORE_BYTES = 1 << 20  # fits in the cache of a core
_PART = 32  # adjacent similarities that are inspected one by one only if their maximum is among the best


def paired_similarity(left: ArrayLike, right: ArrayLike) -> np.ndarray:
    """Dot product of each row of ``left`` with the same row of ``right``.

    :func:`top_k` ranks candidates by exactly this arithmetic, so that equal vectors have equal similarities.

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
    queries: ArrayLike | torch.Tensor,
    corpus: ArrayLike | torch.Tensor,
    k: int,
    *,
    max_similarity: float | Sequence[float] | np.ndarray | None = None,
    exclude: Sequence[Sequence[int]] | None = None,
    query_chunk: int = 1024,
    corpus_chunk: int = 8192,
    device: str | torch.device | None = None,
    show_progress_bar: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k most similar corpus vectors of each query; the result equals a float64 brute-force search.

    A float32 matrix product proposes a few more than k candidates per query. Candidates that are too close to each other
    or to the limit for float32 are compared in float64; ties are broken by corpus position. If float32 cannot prove that
    the proposal contains the result (many nearly equal vectors), the query is searched again in float64, which the
    device must support.

    Memory is bounded by a few blocks of ``query_chunk`` x ``corpus_chunk`` similarities, 32 MiB each by default. A
    memory-mapped corpus is not copied, and a float16 corpus is converted ``corpus_chunk`` vectors at a time. A GPU also
    holds the corpus in float32 if that takes less than half of its free memory.

    Args:
        queries: Array or tensor of shape (n, dim).
        corpus: Array or tensor of shape (m, dim); may be a memory map.
        k: Number of neighbors, at least 1.
        max_similarity: Exclusive upper limit of the similarity: one number, or one per query. Infinity means no limit.
            Defaults to None, no limit.
        exclude: Corpus positions to exclude for each query. Defaults to None.
        query_chunk: Number of queries per block. Defaults to 1024.
        corpus_chunk: Number of corpus vectors per block. Defaults to 8192.
        device: Device of the matrix products. Defaults to None, the CPU with NumPy's BLAS.
        show_progress_bar: Show a progress bar over blocks. Defaults to False.

    Returns:
        tuple[np.ndarray, np.ndarray]: Similarities (float32, decreasing) and corpus positions (int64), both of shape
        (n, k). If fewer than k neighbors qualify, the rest is filled with -inf and -1.

    Raises:
        ValueError: If shapes do not match, ``k`` is below 1, or a vector is not finite.

    Example:
        >>> from unime_st.retrieval import top_k
        >>> scores, indices = top_k([[1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]], 2, max_similarity=1.0)
        >>> indices, scores
        (array([[2, 0]]), array([[0.6, 0. ]], dtype=float32))
    """
    left, right = _matrix(queries, "queries"), _matrix(corpus, "corpus")
    check_count("k", k)
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"queries and corpus must have equal dimensions, got {left.shape[1]} and {right.shape[1]}")
    limit = np.full(len(left), np.inf) if max_similarity is None else np.asarray(max_similarity)
    if isinstance(max_similarity, bool) or limit.dtype.kind not in "fiu" or np.isnan(limit).any():
        raise ValueError(f"max_similarity must be a number, or one per query, got {max_similarity!r:.60}")
    limit = np.broadcast_to(limit.astype(np.float64), (len(left),))
    if exclude is not None and len(exclude) != len(left):
        raise ValueError(f"exclude has {len(exclude)} lists for {len(left)} queries")
    norms, largest_norm = _norms(left, "queries"), _norms(right, "corpus").max(initial=0.0)
    scores = np.full((len(left), k), -np.inf, dtype=np.float32)
    indices = np.full((len(left), k), -1, dtype=np.int64)
    # Float32 may rank a neighbor of rank k slightly lower, the more so with a limit among many similar vectors.
    spare = max(8 if np.isposinf(limit).all() else 64, k // 4)
    search = _Search(right, float(largest_norm), k, spare, corpus_chunk, torch.device(device or "cpu"))
    starts = range(0, len(left), query_chunk)
    for start in tqdm(starts, desc="searching", unit="block", disable=not show_progress_bar):
        block = slice(start, start + query_chunk)
        excluded = [()] * len(left[block]) if exclude is None else exclude[block]
        scores[block], indices[block] = search.answers(left[block], norms[block], limit[block], excluded)
    return scores, indices


class _Search:
    """Search of one corpus for blocks of queries."""

    def __init__(
        self, corpus: np.ndarray, largest_norm: float, k: int, spare: int, chunk: int, device: torch.device
    ) -> None:
        self.corpus, self.largest_norm, self.k, self.chunk, self.device = corpus, largest_norm, k, chunk, device
        self.width = k + spare
        self._crowded = False
        self._out = np.empty(0, dtype=np.float32)
        self._resident = self._on_the_device()

    def answers(
        self, queries: np.ndarray, norms: np.ndarray, limit: np.ndarray, exclude: Sequence[Sequence[int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search in float32, undecided queries again in float64, and exact ties by brute force."""
        scores = np.full((len(queries), self.k), -np.inf)
        indices = np.full((len(queries), self.k), -1, dtype=np.int64)
        rows = np.arange(len(queries))
        for dtype in (torch.float32, torch.float64):
            if len(rows):
                excluded = [exclude[row] for row in rows.tolist()]
                score, index, certain = self._attempt(queries[rows], norms[rows], limit[rows], excluded, dtype)
                scores[rows[certain], : score.shape[1]] = score[certain]
                indices[rows[certain], : score.shape[1]] = index[certain]
                rows = rows[~certain]
        for row in rows.tolist():
            score, index = self._brute_force(queries[row], limit[row], exclude[row])
            scores[row, : len(score)], indices[row, : len(score)] = score, index
        return scores, indices

    def _attempt(
        self,
        queries: np.ndarray,
        norms: np.ndarray,
        limit: np.ndarray,
        exclude: Sequence[Sequence[int]],
        dtype: torch.dtype,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best proposals rescored in float64, their positions, and for which queries the result is proven."""
        limits = torch.finfo(dtype)
        # Blocked sums of d products deviate by about sqrt(d) roundings; eight times that is a safe margin. Subnormal
        # values may be flushed to zero.
        size, width = norms * self.largest_norm, queries.shape[1]
        error = 4 * limits.eps * np.sqrt(width) * size + width * limits.tiny
        proposed, where = self._propose(queries, limit + error, exclude, dtype)
        contenders = _contenders(proposed, limit, error, self.k)
        similarity = np.where(contenders, proposed, -np.inf)
        self._rescore(queries, where, contenders & _unclear(proposed, limit, error), similarity)
        similarity[similarity >= limit[:, None]] = -np.inf
        order = np.lexsort((where, -similarity), axis=1)[:, : self.k]
        score, index = np.take_along_axis(similarity, order, 1), np.take_along_axis(where, order, 1)
        index[np.isneginf(score)] = -1
        certain = size < limits.max  # otherwise the proposals may have overflowed
        if proposed.shape[1] < len(self.corpus):
            least = proposed[:, -1]  # no other vector is above it
            certain &= np.isneginf(least) | (score[:, -1] > least + error)
        return score, index, certain

    def _propose(
        self, queries: np.ndarray, bound: np.ndarray, exclude: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best ``width`` similarities below the bound, in one precision and in decreasing order, and their positions."""
        left = torch.tensor(queries, dtype=dtype, device=self.device)
        upper = torch.tensor(np.minimum(bound, torch.finfo(dtype).max), dtype=dtype, device=self.device)[:, None]
        rows, columns = _flatten(exclude)
        best = torch.empty((len(queries), 0), dtype=dtype, device=self.device)
        where = torch.empty((len(queries), 0), dtype=torch.int64, device=self.device)
        for start in range(0, len(self.corpus), self.chunk):
            stop = min(start + self.chunk, len(self.corpus))
            similarity = self._similarity(left, start, stop)
            inside = (columns >= start) & (columns < stop)
            similarity[rows[inside], columns[inside] - start] = -torch.inf
            found, index = self._better(similarity, upper, best)
            best, where = torch.cat([best, found], 1), torch.cat([where, index + start], 1)
            best, kept = best.topk(min(self.width, best.shape[1]), dim=1, sorted=False)
            where = where.gather(1, kept)
        best, order = best.sort(dim=1, descending=True)
        return best.cpu().numpy().astype(np.float64), where.gather(1, order).cpu().numpy()

    def _similarity(self, left: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Similarities to a block of the corpus, in a buffer that the next block reuses."""
        if self._resident is not None and left.dtype == torch.float32:
            return left @ self._resident[start:stop].T
        if self.device.type != "cpu":
            return left @ self._moved(start, stop, left.dtype).T
        # NumPy's BLAS accepts read-only memory and is faster than PyTorch's on some processors.
        factor = left.numpy()
        block = np.asarray(self.corpus[start:stop], dtype=factor.dtype)
        size = len(factor) * len(block)
        if self._out.dtype != factor.dtype or self._out.size < size:
            self._out = np.empty(size, dtype=factor.dtype)
        out = self._out[:size].reshape(len(factor), len(block))
        with np.errstate(over="ignore", invalid="ignore"):  # overflow is detected by the norms
            return torch.from_numpy(np.matmul(factor, block.T, out=out))

    def _on_the_device(self) -> torch.Tensor | None:
        """The corpus on a GPU with enough memory: copying it for every block of queries would dominate the time."""
        if self.device.type != "cuda" or 4 * self.corpus.size > torch.cuda.mem_get_info(self.device)[0] / 2:
            return None
        resident = torch.empty(self.corpus.shape, dtype=torch.float32, device=self.device)
        for start in range(0, len(self.corpus), self.chunk):
            stop = min(start + self.chunk, len(self.corpus))
            resident[start:stop] = self._moved(start, stop, torch.float32)
        return resident

    def _moved(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        # A copy, because PyTorch cannot share memory that is read-only.
        return torch.tensor(np.asarray(self.corpus[start:stop]), dtype=dtype, device=self.device)

    def _better(
        self, similarity: torch.Tensor, upper: torch.Tensor, best: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries of a block that improve on the best so far: similarities, padded with -inf, and columns.

        Few entries of a row do. Only parts whose maximum does are inspected entry by entry, which costs a fraction of
        sorting the row.
        """
        full = best.shape[1] == self.width
        if not full or self._crowded:
            above = similarity > upper
            self._crowded = bool(above.count_nonzero() > above.numel() / _PART)  # most parts contain one
            similarity.masked_fill_(above, -torch.inf)
        if not full and similarity.shape[1] < self.width * _PART:
            return similarity.topk(min(self.width, similarity.shape[1]), dim=1, sorted=False)
        if rest := -similarity.shape[1] % _PART:
            similarity = nn.functional.pad(similarity, (0, rest), value=-torch.inf)
        parts = similarity.view(-1, _PART)
        tops = parts.amax(1).view(len(best), -1)
        if full:
            least = best.amin(1)
        else:  # the width-th largest maximum of a part is a lower bound
            least = tops.topk(self.width, dim=1)[0][:, -1].nextafter(best.new_tensor(-torch.inf))
        row, part = (tops > least[:, None]).nonzero(as_tuple=True)
        entries = parts.index_select(0, row * tops.shape[1] + part)
        hits = ((entries > least[row, None]) & (entries <= upper[row])).view(-1).nonzero()[:, 0]
        value, row, column = entries.view(-1)[hits], row[hits // _PART], part[hits // _PART] * _PART + hits % _PART
        counts = row.bincount(minlength=len(best))
        position = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        most = max(int(counts.max()), 0 if full else self.width)
        found = best.new_full((len(best), most), -torch.inf)
        index = torch.zeros((len(best), most), dtype=torch.int64, device=row.device)
        found[row, position], index[row, position] = value, column
        return found, index

    def _rescore(self, queries: np.ndarray, where: np.ndarray, chosen: np.ndarray, similarity: np.ndarray) -> None:
        """Replace the chosen similarities by float64 values."""
        step = max(1, _RESCORE_BYTES // (8 * queries.shape[1]))

        def rescore(rows: range) -> None:
            for row in rows:
                query, (columns,) = queries[row].astype(np.float64), chosen[row].nonzero()
                for start in range(0, len(columns), step):
                    part = columns[start : start + step]
                    # Converted beforehand, which is twice as fast as a conversion during the multiplication.
                    found = self.corpus[where[row, part]].astype(np.float64)
                    similarity[row, part] = paired_similarity(query, found)

        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(rescore, [range(first, len(queries), threads) for first in range(threads)]))

    def _brute_force(self, query: np.ndarray, limit: float, exclude: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        starts = range(0, len(self.corpus), self.chunk)
        blocks = (self.corpus[start : start + self.chunk] for start in starts)
        similarity = np.concatenate([paired_similarity(query[None, :], block) for block in blocks])
        counts = similarity < limit
        counts[list(exclude)] = False
        index = np.flatnonzero(counts)
        order = np.lexsort((index, -similarity[index]))[: self.k]
        return similarity[index[order]], index[order]


def _matrix(values: ArrayLike | torch.Tensor, name: str) -> np.ndarray:
    """Convert to a 2-d array in the precision of the values, without a copy if possible."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values if values.dtype == torch.float64 else values.float()).numpy()
    kept = getattr(values, "dtype", None) in (np.float16, np.float32, np.float64)
    try:
        matrix = np.asanyarray(values, dtype=None if kept else np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must have shape (n, dim) and hold numbers, got {type(values).__name__}") from error
    if matrix.ndim != 2:
        raise ValueError(f"{name} must have shape (n, dim), got {matrix.shape}")
    return matrix


def _norms(matrix: np.ndarray, name: str) -> np.ndarray:
    norms = np.sqrt(np.einsum("nd,nd->n", matrix, matrix, dtype=np.float64))
    bad = np.flatnonzero(~np.isfinite(norms))
    if len(bad):
        raise ValueError(f"{name}: {len(bad)} vectors are not finite, the first at position {bad[0]}")
    return norms


def _contenders(proposed: np.ndarray, limit: np.ndarray, error: np.ndarray, k: int) -> np.ndarray:
    """Mask of sorted proposals that may be among the k best below the limit, with errors up to ``error``."""
    if not proposed.size:
        return np.zeros(proposed.shape, dtype=bool)
    certain = proposed < (limit - error)[:, None]
    enough = certain.cumsum(axis=1) >= k
    kth = np.take_along_axis(proposed, enough.argmax(axis=1)[:, None], axis=1)
    least = np.where(enough[:, -1:], kth - 2 * error[:, None], -np.inf)
    return np.isfinite(proposed) & (proposed >= least)


def _unclear(proposed: np.ndarray, limit: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Mask of sorted proposals whose order relative to a neighbor or the limit is uncertain, given ``error``."""
    unclear = np.abs(proposed - limit[:, None]) <= error[:, None]
    with np.errstate(invalid="ignore"):  # -inf less -inf
        close = proposed[:, :-1] - proposed[:, 1:] <= 2 * error[:, None]
    unclear[:, :-1] |= close
    unclear[:, 1:] |= close
    return unclear


def _flatten(exclude: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.repeat(np.arange(len(exclude)), [len(excluded) for excluded in exclude])
    columns = np.fromiter((index for excluded in exclude for index in excluded), dtype=np.int64, count=len(rows))
    return rows, columns
