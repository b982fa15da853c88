"""Which rows stand together in a batch: data sets mixed or side by side, nothing twice, the same on any number of ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler

_PATIENCE = 4  # passes over the data after which a batch without duplicates counts as impossible


class RowBatches(DefaultBatchSampler):
    """Batch sampler over rows of item ids.

    Rows are drawn for all processes together and dealt out in order, so that two processes with half the batch see the
    same rows as one process with the whole. The order depends on seed and epoch alone.

    Args:
        dataset: Rows with the columns ``query`` and ``positive`` of item ids.
        batch_size: Rows per process and batch.
        drop_last: Leave out the rows that fill no batch; otherwise they are a smaller batch at the end, shared out
            as evenly as they can be. Fewer rows than processes are left out.
        seed: Seed of the order.
        world_size: Number of processes.
        datasets: Number of each row's data set; None (default) means one.
        temperature: Data sets are drawn by ``size ** (1 / temperature)``. Defaults to 1, where an epoch is every row
            once.
        sub_batch_size: Rows of one data set that follow each other, from the first row of a batch on. A data set that
            ends, or has too few distinct rows, gives fewer, at the end of a batch. Defaults to 1: all mixed.
        distinct: No query and no positive comes twice in the batch of all processes, or it would be its own in-batch
            negative. Defaults to True.
        costs: Tokens of each row. If given, the rows of ``balanced`` batches are dealt out so that all cost the same.
        balanced: Batches of all processes that are accumulated into one step. Defaults to 1.
        even: The loss takes only as many rows from every process: of the smaller batch the rows that cannot be shared
            out evenly are left out. Defaults to False.

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
        generator: Any = None,
        seed: int = 0,
        *,
        world_size: int = 1,
        datasets: np.ndarray | None = None,
        temperature: float = 1.0,
        sub_batch_size: int | None = None,
        distinct: bool = True,
        costs: np.ndarray | None = None,
        balanced: int = 1,
        even: bool = False,
    ) -> None:
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        self.world_size, self.sub_batch_size, self.costs, self.even = world_size, sub_batch_size or 1, costs, even
        self.unit = batch_size * world_size * balanced
        self.rows = len(dataset)
        self.pieces = world_size * balanced
        self._keys = _codes(dataset) if distinct else None
        self._groups = _groups(np.zeros(self.rows, dtype=np.int64) if datasets is None else datasets, temperature)
        # What accelerate needs to hear, to leave batches of any size as they are.
        self.batch_size = None  # type: ignore[assignment]
        if self._keys is not None:
            self._refuse_the_impossible(batch_size * world_size)

    def _refuse_the_impossible(self, size: int) -> None:
        assert self._keys is not None
        fewest = min(len(np.unique(column)) for column in self._keys.T)
        if self.rows >= size > fewest:
            raise ValueError(
                f"a batch of {size} rows without duplicates is impossible: the data have {fewest} distinct queries or "
                "positives only. Lower batch_size, or add data."
            )

    @property
    def remainder(self) -> int:
        """Rows of the last, smaller batch; 0 if it is left out."""
        left = 0 if self.drop_last else self.rows % self.unit
        if self.even:
            left -= left % self.world_size
        return left if left >= self.world_size else 0

    @property
    def _last_pieces(self) -> int:
        """Into how many batches the remainder is dealt out: none of them empty, as many for every process."""
        return min(self.pieces, self.remainder // self.world_size * self.world_size)

    def __len__(self) -> int:
        return self.pieces * (self.rows // self.unit) + self._last_pieces

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed or 0, self.epoch])
        sizes = [self.unit] * (self.rows // self.unit) + [self.remainder] * (self.remainder > 0)
        batches = self._mixed(rng, sizes) if self.sub_batch_size == 1 else self._side_by_side(rng, sizes)
        for number, batch in enumerate(batches):
            yield from self._dealt(batch, self.pieces if number < self.rows // self.unit else self._last_pieces)

    def _mixed(self, rng: np.random.Generator, sizes: list[int]) -> Iterator[list[int]]:
        stream = self._stream(rng)
        deferred: list[int] = []
        for size in sizes:
            batch, deferred = self._take(size, stream, deferred)
            yield batch

    def _side_by_side(self, rng: np.random.Generator, sizes: list[int]) -> Iterator[list[int]]:
        """Whole sub-batches first; in a batch in which a data set ends, what was left of it comes last."""
        queues = [_Queue(members, rng) for members, _ in self._groups]
        quotas = np.array([quota for _, quota in self._groups])
        left = quotas.copy()
        for size in sizes:
            whole: list[int] = []
            short: list[int] = []
            taken: set[int] = set()
            able = np.ones(len(queues), dtype=bool)  # to add a row to this batch

            def fits(row: int, taken: set[int] = taken) -> bool:
                keys = set() if self._keys is None else set(self._keys[row].tolist())
                free = taken.isdisjoint(keys)
                taken |= keys if free else set()
                return free

            while room := size - len(whole) - len(short):
                if not able.any():
                    raise _no_batch_of(size)
                if not (left * able).any():
                    left += quotas  # the next pass begins
                turn = int(rng.choice(len(queues), p=left * able / (left * able).sum()))
                rows = queues[turn].take(min(self.sub_batch_size, room, int(left[turn])), fits)
                (whole if len(rows) == self.sub_batch_size else short).extend(rows)
                left[turn] -= len(rows)
                able[turn] = bool(rows)
            yield whole + short

    def _take(self, size: int, stream: Iterator[int], deferred: list[int]) -> tuple[list[int], list[int]]:
        if self._keys is None:
            return [next(stream) for _ in range(size)], []
        batch: list[int] = []
        taken: set[int] = set()
        waiting: list[int] = []

        def index(row: int) -> None:
            query, positive = self._keys[row]  # type: ignore[index]  # checked above
            if len(batch) == size or query in taken or positive in taken:
                waiting.append(row)
            else:
                batch.append(row)
                taken.update((query, positive))

        for row in deferred:
            index(row)
        for _ in range(_PATIENCE * self.rows):
            if len(batch) == size:
                return batch, waiting
            index(next(stream))
        raise _no_batch_of(size)

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
        # Back and forth over the rows by falling cost: every piece gets as many rows and nearly as many tokens.
        order = sorted(batch, key=lambda row: -self.costs[row])  # type: ignore[index]
        pieces: list[list[int]] = [[] for _ in range(count)]
        for index, row in enumerate(order):
            turn, position = divmod(index, count)
            pieces[count - 1 - position if turn % 2 else position].append(row)
        return pieces


class _Queue:
    """Rows of a data set in random order, pass after pass; those that do not fit into a batch wait for the next one."""

    def __init__(self, members: np.ndarray, rng: np.random.Generator) -> None:
        self._members, self._rng = members, rng
        self._fresh: list[int] = []
        self._waiting: deque[int] = deque()

    def take(self, count: int, fits: Callable[[int], bool]) -> list[int]:
        """Return so many rows that fit, or fewer where all others of the data set do not."""
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


def _no_batch_of(size: int) -> ValueError:
    return ValueError(
        f"no batch of {size} rows without duplicates was found: too many rows share their query or positive. "
        "Lower batch_size, or raise dataset_temperature."
    )


def _codes(dataset: Dataset) -> np.ndarray:
    """A number for the query and the positive of every row, equal for equal items; shape (rows, 2)."""
    columns = [np.array(dataset.with_format("arrow")[name].to_pylist()) for name in ("query", "positive")]
    _, codes = np.unique(np.concatenate(columns), return_inverse=True)
    return codes.reshape(2, -1).T


def _groups(datasets: np.ndarray, temperature: float) -> list[tuple[np.ndarray, int]]:
    """Rows of every data set, and how many of them one pass takes."""
    members = [np.flatnonzero(datasets == number) for number in np.unique(datasets)]
    weights = np.array([len(rows) for rows in members], dtype=np.float64) ** (1.0 / temperature)
    ends = np.floor(np.cumsum(weights / weights.sum()) * len(datasets) + 0.5).astype(int)
    quotas = [len(rows) for rows in members] if temperature == 1.0 else np.diff(ends, prepend=0).tolist()
    return [(rows, quota) for rows, quota in zip(members, quotas) if quota]


def sampler(
    *, world_size: int = 1, datasets: Sequence[str] | None = None, drop_last: bool | None = None, **options: Any
) -> Callable[..., RowBatches]:
    """Return what the trainer calls to make its batch sampler.

    Args:
        world_size: Number of processes.
        datasets: Name of each row's data set.
        drop_last: Instead of what the trainer says, whose options turn it on wherever there are several processes,
            for fear of shards of different size. None (default) obeys.
        **options: As of :class:`RowBatches`.

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
