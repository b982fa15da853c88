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
from unime_st.retrieval.products import product

_RESCORE_BYTES = 1 << 20  # fits in the cache of a core
_PART = 32  # adjacent similarities that are inspected one by one only if their maximum is among the best
_DEVICE_BYTES = 1 << 30  # of the largest tensor beside a corpus that is on a GPU
Matrix = np.ndarray | torch.Tensor
_IndexLists = Sequence[Sequence[int]]
_EXACT_IN_FLOAT32 = ("float16", "bfloat16", "float32")


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
    holds the corpus in float32 if that takes less than half of its free memory; then blocks are 1 GiB each, and
    candidates are compared on the GPU. Tensors that are on the GPU already are not copied.

    Args:
        queries: Array or tensor of shape (n, dim).
        corpus: Array or tensor of shape (m, dim); may be a memory map.
        k: Number of neighbors, at least 1.
        max_similarity: Exclusive upper limit of the similarity: one number, or one per query. Infinity means no limit.
            Defaults to None, no limit.
        exclude: Corpus positions to exclude for each query. Defaults to None.
        query_chunk: Number of queries per block. Defaults to 1024.
        corpus_chunk: Number of corpus vectors per block. Defaults to 8192.
        device: Device of the matrix products. Defaults to None, the CPU.
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
    device = torch.device(device or "cpu")
    left, right = _matrix(queries, "queries", device), _matrix(corpus, "corpus", device)
    check_count("k", k)
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"queries and corpus must have equal dimensions, got {left.shape[1]} and {right.shape[1]}")
    limit = np.full(len(left), np.inf) if max_similarity is None else np.asarray(max_similarity)
    if isinstance(max_similarity, bool) or limit.dtype.kind not in "fiu" or np.isnan(limit).any():
        raise ValueError(f"max_similarity must be a number, or one per query, got {max_similarity!r:.60}")
    limit = np.broadcast_to(limit.astype(np.float64), (len(left),))
    if exclude is not None and len(exclude) != len(left):
        raise ValueError(f"exclude has {len(exclude)} lists for {len(left)} queries")
    scores = np.full((len(left), k), -np.inf, dtype=np.float32)
    indices = np.full((len(left), k), -1, dtype=np.int64)
    # Float32 may rank a neighbor of rank k slightly lower, the more so with a limit among many similar vectors.
    spare = max(8 if np.isposinf(limit).all() else 64, k // 4)
    norms, search = _norms(left, "queries"), _Search(right, k, spare, corpus_chunk, device)
    for start in tqdm(range(0, len(left), query_chunk), desc="searching", unit="block", disable=not show_progress_bar):
        block = slice(start, start + query_chunk)
        excluded = [()] * len(left[block]) if exclude is None else exclude[block]
        scores[block], indices[block] = search.answers(left[block], norms[block], limit[block], excluded)
    return scores, indices


class _Search:
    """Search of one corpus for blocks of queries."""

    def __init__(self, corpus: Matrix, k: int, spare: int, chunk: int, device: torch.device) -> None:
        self.corpus, self.k, self.chunk, self.device = corpus, k, chunk, device
        self.width = k + spare
        self._crowded = False
        self._out = torch.empty(0)
        self._resident = self._on_the_device()
        exact = str(corpus.dtype).removeprefix("torch.") in _EXACT_IN_FLOAT32
        self._compares_on_device = self._resident is not None and exact
        norms = _norms(self._resident if self._resident is not None and exact else corpus, "corpus")
        self.largest_norm = float(norms.max(initial=0.0))

    def answers(
        self, queries: Matrix, norms: np.ndarray, limit: np.ndarray, exclude: _IndexLists
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
        self, queries: Matrix, norms: np.ndarray, limit: np.ndarray, exclude: _IndexLists, dtype: torch.dtype
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best proposals rescored in float64, their positions, and for which queries the result is proven."""
        size = norms * self.largest_norm
        error, least_error = (_rounding_error(size, queries.shape[1], each) for each in (dtype, torch.float64))
        proposed, indices = self._propose(queries, limit + error, exclude, dtype)
        margin, least_margin, bound = (
            torch.tensor(values, device=proposed.device)[:, None] for values in (error, least_error, limit)
        )
        contenders = _contenders(proposed, bound, margin, self.k)
        similarity = proposed.masked_fill(~contenders, -torch.inf)
        unclear = contenders & _unclear(proposed, bound, margin)
        if self._compares_on_device:  # what float64 on the device leaves open is compared by the arithmetic of the CPU
            self._rescore_on_device(queries, indices, unclear, similarity)
            similarity, indices = _in_order(similarity, indices)
            unclear = similarity.isfinite() & _unclear(similarity, bound, least_margin)
        if not self._compares_on_device or bool(unclear.any()):
            similarity = self._rescore_on_host(queries, indices, unclear, similarity)
        similarity.masked_fill_(similarity >= bound, -torch.inf)
        similarity, indices = (found[:, : self.k] for found in _in_order(similarity, indices))
        indices = indices.masked_fill(similarity.isneginf(), -1)
        score = similarity.cpu().numpy()
        certain = size < torch.finfo(dtype).max  # otherwise the proposals may have overflowed
        if proposed.shape[1] < len(self.corpus):
            least = proposed[:, -1].cpu().numpy()  # no other vector is above it
            certain &= np.isneginf(least) | (score[:, -1] > least + error)
        return score, indices.cpu().numpy(), certain

    def _propose(
        self, queries: Matrix, bound: np.ndarray, exclude: _IndexLists, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best ``width`` similarities below the bound, in one precision and in decreasing order, and their positions."""
        left = torch.as_tensor(queries).to(self.device, dtype)
        upper = torch.tensor(np.minimum(bound, torch.finfo(dtype).max), dtype=dtype, device=self.device)[:, None]
        bounded = bool(np.isfinite(bound).any())
        rows, columns = _flatten(exclude)
        best = torch.empty((len(queries), 0), dtype=dtype, device=self.device)
        indices = torch.empty((len(queries), 0), dtype=torch.int64, device=self.device)
        chunk = self.chunk
        if self._resident is not None and dtype == torch.float32:
            chunk = max(chunk, _DEVICE_BYTES // (4 * len(queries)))
        for start in range(0, len(self.corpus), chunk):
            stop = min(start + chunk, len(self.corpus))
            similarity = self._similarity(left, start, stop)
            inside = (columns >= start) & (columns < stop)
            if inside.any():
                similarity[rows[inside], columns[inside] - start] = -torch.inf
            if self.device.type == "cpu":
                found, column = self._better(similarity, upper, best)
            else:  # sorting is cheap there, and waiting for a number of entries is not
                similarity = similarity.masked_fill_(similarity > upper, -torch.inf) if bounded else similarity
                found, column = similarity.topk(min(self.width, stop - start), dim=1, sorted=False)
            best, indices = torch.cat([best, found], 1), torch.cat([indices, column + start], 1)
            best, kept = best.topk(min(self.width, best.shape[1]), dim=1, sorted=False)
            indices = indices.gather(1, kept)
        if not self._compares_on_device:
            best, indices = best.cpu(), indices.cpu()
        best, order = best.sort(dim=1, descending=True)
        return best.double(), indices.gather(1, order)

    def _similarity(self, left: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Similarities to a block of the corpus, in a buffer that the next block reuses."""
        if self._resident is not None and left.dtype == torch.float32:
            return left @ self._resident[start:stop].T
        if self.device.type != "cpu":
            return left @ self._moved(start, stop, left.dtype).T
        block = np.asarray(self.corpus[start:stop], dtype=left.numpy().dtype)
        size = len(left) * len(block)
        if self._out.dtype != left.dtype or len(self._out) < size:
            self._out = torch.empty(size, dtype=left.dtype)
        return product(left, block, self._out[:size].view(len(left), len(block)))

    def _on_the_device(self) -> torch.Tensor | None:
        """The corpus on a GPU with enough memory: copying it for every block of queries would dominate the time."""
        if isinstance(self.corpus, torch.Tensor):
            return self.corpus
        if self.device.type != "cuda" or 4 * self.corpus.size > torch.cuda.mem_get_info(self.device)[0] / 2:
            return None
        resident = torch.empty(self.corpus.shape, dtype=torch.float32, device=self.device)
        for start in range(0, len(self.corpus), self.chunk):
            stop = min(start + self.chunk, len(self.corpus))
            resident[start:stop] = self._moved(start, stop, torch.float32)
        return resident

    def _moved(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        block = self.corpus[start:stop]
        if isinstance(block, torch.Tensor):
            return block.to(dtype)
        # PyTorch cannot share memory that is read-only.
        shared = torch.from_numpy(block) if block.flags.writeable else torch.tensor(np.asarray(block))
        return shared.to(self.device, dtype)

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

    def _rescore_on_device(
        self, queries: Matrix, indices: torch.Tensor, chosen: torch.Tensor, similarity: torch.Tensor
    ) -> None:
        """Replace the chosen similarities by products in float64 on the device."""
        assert self._resident is not None
        left, step = torch.as_tensor(queries).to(self.device), max(1, _DEVICE_BYTES // (32 * queries.shape[1]))
        for rows, columns in zip(*(found.split(step) for found in chosen.nonzero(as_tuple=True))):
            products = left[rows].double() * self._resident[indices[rows, columns]].double()
            similarity[rows, columns] = products.sum(dim=1)

    def _rescore_on_host(
        self, queries: Matrix, indices: torch.Tensor, chosen: torch.Tensor, similarity: torch.Tensor
    ) -> torch.Tensor:
        """Replace the chosen similarities by float64 values."""
        step = max(1, _RESCORE_BYTES // (8 * queries.shape[1]))
        index, mask, values = indices.cpu().numpy(), chosen.cpu().numpy(), similarity.cpu().numpy()
        due = np.flatnonzero(mask.any(axis=1))

        def rescore(rows: np.ndarray) -> None:
            for row in rows.tolist():
                query, (columns,) = _on_the_host(queries[row]).astype(np.float64), mask[row].nonzero()
                for start in range(0, len(columns), step):
                    part = columns[start : start + step]
                    # Converted beforehand, which is twice as fast as a conversion during the multiplication.
                    found = _on_the_host(self.corpus[index[row, part]]).astype(np.float64)
                    values[row, part] = paired_similarity(query, found)

        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(rescore, [due[first::threads] for first in range(threads)]))
        return torch.from_numpy(values).to(similarity.device)

    def _brute_force(self, query: Matrix, limit: float, exclude: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        starts, own = range(0, len(self.corpus), self.chunk), _on_the_host(query)[None, :]
        blocks = (_on_the_host(self.corpus[start : start + self.chunk]) for start in starts)
        similarity = np.concatenate([paired_similarity(own, block) for block in blocks])
        counts = similarity < limit
        counts[list(exclude)] = False
        index = np.flatnonzero(counts)
        order = np.lexsort((index, -similarity[index]))[: self.k]
        return similarity[index[order]], index[order]


def _on_the_host(values: Matrix) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else values


def _in_order(similarity: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort by decreasing similarity, equal ones by position."""
    indices, order = indices.sort(dim=1)
    similarity, order = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
    return similarity, indices.gather(1, order)


def _matrix(values: ArrayLike | torch.Tensor, name: str, device: torch.device) -> Matrix:
    """Convert to a 2-d array in the precision of the values, without a copy if possible; a tensor of the GPU stays there."""
    if isinstance(values, torch.Tensor):
        values = values.detach()
        stays = values.is_cuda and device.type == "cuda" and device.index in (None, values.device.index)
        if stays and values.ndim == 2 and str(values.dtype).removeprefix("torch.") in _EXACT_IN_FLOAT32:
            return values.float()
        values = values.cpu()
        values = (values if values.dtype == torch.float64 else values.float()).numpy()
    kept = getattr(values, "dtype", None) in (np.float16, np.float32, np.float64)
    try:
        matrix = np.asanyarray(values, dtype=None if kept else np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must have shape (n, dim) and hold numbers, got {type(values).__name__}") from error
    if matrix.ndim != 2:
        raise ValueError(f"{name} must have shape (n, dim), got {matrix.shape}")
    return matrix


def _norms(matrix: Matrix, name: str) -> np.ndarray:
    if isinstance(matrix, torch.Tensor):
        rows = max(1, _DEVICE_BYTES // (16 * max(1, matrix.shape[1])))
        norms = torch.cat([part.double().norm(dim=1) for part in matrix.split(rows)]).cpu().numpy()
    else:
        norms = np.sqrt(np.einsum("nd,nd->n", matrix, matrix, dtype=np.float64))
    bad = np.flatnonzero(~np.isfinite(norms))
    if len(bad):
        raise ValueError(f"{name}: {len(bad)} vectors are not finite, the first at position {bad[0]}")
    return norms


def _rounding_error(size: np.ndarray, width: int, dtype: torch.dtype) -> np.ndarray:
    """Largest error of dot products of ``width`` numbers in a precision; ``size`` holds the products of the norms.

    Blocked sums of d products deviate by about sqrt(d) roundings; eight times that is a safe margin. Subnormal values
    may be flushed to zero.
    """
    precision = torch.finfo(dtype)
    return np.asarray(4 * precision.eps * np.sqrt(width) * size + width * precision.tiny)


def _contenders(proposed: torch.Tensor, limit: torch.Tensor, error: torch.Tensor, k: int) -> torch.Tensor:
    """Mask of sorted proposals that may be among the k best below the limit, with errors up to ``error``."""
    if not proposed.numel():
        return torch.zeros_like(proposed, dtype=torch.bool)
    counts = (proposed < limit - error).cumsum(dim=1)  # of proposals that are certainly below the limit
    kth = proposed.gather(1, (counts < k).sum(dim=1, keepdim=True).clamp(max=proposed.shape[1] - 1))
    least = (kth - 2 * error).masked_fill(counts[:, -1:] < k, -torch.inf)
    return proposed.isfinite() & (proposed >= least)


def _unclear(proposed: torch.Tensor, limit: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Mask of sorted proposals whose order relative to a neighbor or the limit is uncertain, given ``error``."""
    unclear = (proposed - limit).abs() <= error
    close = proposed[:, :-1] - proposed[:, 1:] <= 2 * error
    unclear[:, :-1] |= close
    unclear[:, 1:] |= close
    return unclear


def _flatten(exclude: _IndexLists) -> tuple[np.ndarray, np.ndarray]:
    rows = np.repeat(np.arange(len(exclude)), [len(excluded) for excluded in exclude])
    columns = np.fromiter((index for excluded in exclude for index in excluded), dtype=np.int64, count=len(rows))
    return rows, columns
