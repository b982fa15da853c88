"""Batch sampler: no duplicates, datasets mixed or in sub-batches, the same rows for any number of processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler

_MAX_PASSES = 4  # passes over the data after which a batch without duplicates counts as impossible


class RowBatches(DefaultBatchSampler):
    """Batch sampler over rows of item ids.

    Rows are drawn for all processes together and dealt out in order, so that two processes with half the batch size get
    the rows of one process with the whole. The order depends on seed and epoch alone.

    Args:
        dataset: Rows with the columns ``query`` and ``positive`` of item ids.
        batch_size: Rows per process and batch.
        drop_last: Drop the rows that fill no batch. Otherwise they form a smaller last batch, shared out as evenly as
            possible; fewer rows than processes are dropped.
        valid_label_columns: Not used; part of the interface.
        generator: Not used; part of the interface.
        seed: Seed of the order. Defaults to 0.
        world_size: Number of processes. Defaults to 1.
        datasets: Number of the dataset of each row. None (default): one dataset.
        temperature: Dataset sampling temperature T: p ~ size^(1/T). Defaults to 1, proportional: an epoch has every row
            once.
        sub_batch_size: Consecutive rows from one dataset, counted from the first row of a batch. A dataset that ends, or
            has too few distinct rows, gives fewer, at the end of a batch. Defaults to 1: all mixed.
        distinct: No query and no positive occurs twice in the batch of all processes, where it would be its own in-batch
            negative. Defaults to True.
        costs: Tokens of each row. If given, rows are dealt out so that all forward passes have similar costs.
        balanced: Batches of all processes that are accumulated into one step. Defaults to 1.
        clusters: Row numbers of each cluster of mutual hard negatives, see
            :func:`~unime_st.training.hard_clusters.hard_clusters`. A batch is made of whole clusters in random order; rows
            that would come twice wait for a later batch. Defaults to None.
        even: The loss needs the same number of rows on every process: drop rows of the last batch that cannot be shared
            out evenly. Defaults to False.

    Raises:
        ValueError: If the data have too few distinct queries or positives for a batch.

    Example:
        >>> from datasets import Dataset
        >>> from unime_st.training.batches import RowBatches
        >>> rows = Dataset.from_dict({"query": ["a", "b", "c", "d"], "positive": ["x", "x", "y", "z"]})
        >>> sorted(sum(RowBatches(rows, 2, drop_last=True), []))
        [0, 1, 2, 3]
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        *,
        world_size: int = 1,
        datasets: np.ndarray | None = None,
        temperature: float = 1.0,
        sub_batch_size: int | None = None,
        distinct: bool = True,
        costs: np.ndarray | None = None,
        balanced: int = 1,
        clusters: Sequence[np.ndarray] | None = None,
        even: bool = False,
    ) -> None:
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        self.world_size, self.sub_batch_size, self.costs, self.even = world_size, sub_batch_size or 1, costs, even
        self.clusters = clusters
        self.unit = batch_size * world_size * balanced
        self.rows = len(dataset)
        self.pieces = world_size * balanced
        self._keys = _codes(dataset) if distinct else None
        self._groups = _groups(np.zeros(self.rows, dtype=np.int64) if datasets is None else datasets, temperature)
        # With None accelerate accepts batches of any size.
        self.batch_size = None  # type: ignore[assignment]
        if self._keys is not None:
            self._check_distinct(batch_size * world_size)

    def _check_distinct(self, size: int) -> None:
        assert self._keys is not None
        fewest = min(len(np.unique(column)) for column in self._keys.T)
        if self.rows >= size > fewest:
            raise ValueError(
                f"a batch of {size} rows without duplicates is impossible: the data have {fewest} distinct queries or "
                "positives. Lower per_device_train_batch_size, or add data."
            )

    @property
    def remainder(self) -> int:
        """Rows of the last, smaller batch; 0 if it is dropped."""
        left = 0 if self.drop_last else self.rows % self.unit
        if self.even:
            left -= left % self.world_size
        return left if left >= self.world_size else 0

    @property
    def _last_pieces(self) -> int:
        """Number of batches of the remainder: the same for every process, and none of them empty."""
        return min(self.pieces, self.remainder // self.world_size * self.world_size)

    def __len__(self) -> int:
        return self.pieces * (self.rows // self.unit) + self._last_pieces

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed or 0, self.epoch])
        sizes = [self.unit] * (self.rows // self.unit) + [self.remainder] * (self.remainder > 0)
        if self.clusters is not None:
            batches = self._in_clusters(rng, sizes, self.clusters)
        else:
            batches = self._mixed(rng, sizes) if self.sub_batch_size == 1 else self._in_sub_batches(rng, sizes)
        for number, batch in enumerate(batches):
            yield from self._dealt(batch, self.pieces if number < self.rows // self.unit else self._last_pieces)

    def _mixed(self, rng: np.random.Generator, sizes: list[int]) -> Iterator[list[int]]:
        stream = self._stream(rng)
        deferred: list[int] = []
        for size in sizes:
            batch, deferred = self._take(size, stream, deferred)
            yield batch

    def _in_sub_batches(self, rng: np.random.Generator, sizes: list[int]) -> Iterator[list[int]]:
        """Whole sub-batches first. The remaining rows of a dataset that ends come last in their batch."""
        queues = [_Queue(members, rng) for members, _ in self._groups]
        quotas = np.array([quota for _, quota in self._groups])
        left = quotas.copy()
        for size in sizes:
            whole: list[int] = []
            short: list[int] = []
            taken: set[int] = set()
            able = np.ones(len(queues), dtype=bool)  # whether a dataset can add a row to this batch

            def fits(row: int, taken: set[int] = taken) -> bool:
                keys = set() if self._keys is None else set(self._keys[row].tolist())
                free = taken.isdisjoint(keys)
                taken |= keys if free else set()
                return free

            while room := size - len(whole) - len(short):
                if not able.any():
                    raise _impossible_batch(size)
                if not (left * able).any():
                    left += quotas  # next pass over the data
                turn = int(rng.choice(len(queues), p=left * able / (left * able).sum()))
                rows = queues[turn].take(min(self.sub_batch_size, room, int(left[turn])), fits)
                (whole if len(rows) == self.sub_batch_size else short).extend(rows)
                left[turn] -= len(rows)
                able[turn] = bool(rows)
            yield whole + short

    def _in_clusters(
        self, rng: np.random.Generator, sizes: list[int], clusters: Sequence[np.ndarray]
    ) -> Iterator[list[int]]:
        """Whole clusters first, then rows that had to wait, then a part of the next cluster."""
        longest = max(map(len, clusters))
        ahead: deque[list[int]] = deque()
        waiting: deque[int] = deque()
        for size in sizes:
            batch: list[int] = []
            taken: set[int] = set()
            passes, waited = 0, False

            def add(rows: list[int], size: int = size, batch: list[int] = batch, taken: set[int] = taken) -> None:
                for row in rows:
                    keys = set() if self._keys is None else set(self._keys[row].tolist())
                    if len(batch) == size or not taken.isdisjoint(keys):
                        waiting.append(row)
                    else:
                        batch.append(row)
                        taken |= keys

            while len(batch) < size:
                if waiting and not waited and (not ahead or size - len(batch) < len(ahead[0])):
                    waited = True
                    add([waiting.popleft() for _ in range(len(waiting))])
                    continue
                if not ahead:
                    passes += 1
                    if passes > _MAX_PASSES:
                        raise _impossible_batch(size)
                    order = rng.permutation(len(clusters)).tolist()
                    order.sort(key=lambda number: len(clusters[number]) < longest)  # a short one shifts no others
                    ahead.extend(clusters[number].tolist() for number in order)
                add(ahead.popleft())
            yield batch

    def _take(self, size: int, stream: Iterator[int], deferred: list[int]) -> tuple[list[int], list[int]]:
        if self._keys is None:
            return [next(stream) for _ in range(size)], []
        batch: list[int] = []
        taken: set[int] = set()
        waiting: list[int] = []

        keys = self._keys

        def add(row: int) -> None:
            query, positive = keys[row]
            if len(batch) == size or query in taken or positive in taken:
                waiting.append(row)
            else:
                batch.append(row)
                taken.update((query, positive))

        for row in deferred:
            add(row)
        for _ in range(_MAX_PASSES * self.rows):
            if len(batch) == size:
                return batch, waiting
            add(next(stream))
        raise _impossible_batch(size)

    def _stream(self, rng: np.random.Generator) -> Iterator[int]:
        while True:
            parts: list[np.ndarray] = []
            for members, quota in self._groups:
                passes = -(-quota // len(members))
                parts.append(np.concatenate([rng.permutation(members) for _ in range(passes)])[:quota])
            yield from rng.permutation(np.concatenate(parts)).tolist()

    def _dealt(self, batch: list[int], count: int) -> list[list[int]]:
        if self.costs is None:
            return [piece.tolist() for piece in np.array_split(np.array(batch), count)]
        # In turn and back over the rows by falling cost: all pieces get the same rows and nearly the same tokens.
        order = np.array(batch)[np.argsort(-self.costs[batch], kind="stable")].tolist()
        pieces: list[list[int]] = [[] for _ in range(count)]
        for index, row in enumerate(order):
            turn, position = divmod(index, count)
            pieces[count - 1 - position if turn % 2 else position].append(row)
        return pieces


class _Queue:
    """Rows of a dataset in random order, pass after pass. Rows that do not fit into a batch wait for the next one."""

    def __init__(self, members: np.ndarray, rng: np.random.Generator) -> None:
        self._members, self._rng = members, rng
        self._fresh: list[int] = []
        self._waiting: deque[int] = deque()

    def take(self, count: int, fits: Callable[[int], bool]) -> list[int]:
        """Return ``count`` rows that fit, or fewer if no other row of the dataset fits."""
        rows: list[int] = []
        waiting: list[int] = []
        count = min(count, len(self._members))
        while len(rows) < count and len(waiting) < len(self._members):
            row = self._waiting.popleft() if self._waiting else self._next()
            (rows if fits(row) else waiting).append(row)
        self._waiting.extendleft(reversed(waiting))
        return rows

    def _next(self) -> int:
        self._fresh = self._fresh or self._rng.permutation(self._members).tolist()
        return self._fresh.pop()


def _impossible_batch(size: int) -> ValueError:
    return ValueError(
        f"no batch of {size} rows without duplicates was found: too many rows share their query or positive. "
        "Lower per_device_train_batch_size, or raise dataset_temperature."
    )


def _codes(dataset: Dataset) -> np.ndarray:
    """Number the query and the positive of each row, equal items alike; shape (rows, 2)."""
    columns = [np.array(dataset.with_format("arrow")[name].to_pylist()) for name in ("query", "positive")]
    _, codes = np.unique(np.concatenate(columns), return_inverse=True)
    return codes.reshape(2, -1).T


def _groups(datasets: np.ndarray, temperature: float) -> list[tuple[np.ndarray, int]]:
    """Rows of each dataset, and how many of them a pass takes."""
    members = [np.flatnonzero(datasets == number) for number in np.unique(datasets)]
    weights = np.array([len(rows) for rows in members], dtype=np.float64) ** (1.0 / temperature)
    ends = np.floor(np.cumsum(weights / weights.sum()) * len(datasets) + 0.5).astype(int)
    quotas = [len(rows) for rows in members] if temperature == 1.0 else np.diff(ends, prepend=0).tolist()
    return [(rows, quota) for rows, quota in zip(members, quotas) if quota]


def sampler(
    *, world_size: int = 1, datasets: Sequence[str] | None = None, drop_last: bool | None = None, **options: Any
) -> Callable[..., RowBatches]:
    """Factory of :class:`RowBatches` for the trainer, which calls it with the dataset and its own arguments.

    ``datasets`` are the names of the rows' datasets (None: one). ``drop_last`` overrides the trainer's value, which is
    always True with several processes.

    Example:
        >>> from datasets import Dataset
        >>> from unime_st.training.batches import sampler
        >>> rows = Dataset.from_dict({"query": ["a", "b"], "positive": ["x", "y"]})
        >>> len(sampler(datasets=["one", "two"])(rows, batch_size=1, drop_last=True))
        2
    """
    numbers = None if datasets is None else np.unique(np.array(datasets), return_inverse=True)[1]

    def make(dataset: Dataset, **given: Any) -> RowBatches:
        given["drop_last"] = given["drop_last"] if drop_last is None else drop_last
        return RowBatches(dataset, **given, world_size=world_size, datasets=numbers, **options)

    return make
