"""Feed: mini-batches of items, decoded and processed in the background just before the model needs them."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import recursively_apply, send_to_device
from torch.utils.data import DataLoader, Dataset

from unime_st.data.items import Item
from unime_st.data.records import ItemFolder
from unime_st.encoding.model_inputs import Features
from unime_st.training.item_errors import naming_items

_PREFETCH = 2  # mini-batches that each worker keeps ready


class ItemFeatures:
    """Makes the features of stored items, opened and preprocessed with the options of their side.

    Args:
        records: The record folder of the items.
        preprocess: ``model.preprocess``, or that of a :class:`~unime_st.training.vision_cache.VisionCache`.
        open_item: Converts an item to an input of ``preprocess``. Defaults to decoding it.
        options: Options of ``preprocess`` for each side, see
            :class:`~unime_st.training.item_prompts.ItemPrompts`. Defaults to one side without options.

    Attributes:
        count: Number of stored items; each has a position on every side.
    """

    def __init__(
        self,
        records: ItemFolder,
        preprocess: Callable[..., Features],
        open_item: Callable[[Item], object] = Item.to_input,
        options: Sequence[Mapping[str, object]] = ({},),
    ) -> None:
        self._records, self._preprocess, self._open_item, self._options = records, preprocess, open_item, options
        self.count = len(records.items)

    def item(self, position: int) -> Item:
        """The item at a position of any side, undecoded."""
        return self._records.items.at(int(position) % self.count)

    def __call__(self, positions: Sequence[int]) -> Features:
        """Features of the items at these positions, which are on the same side, as one mini-batch.

        Raises:
            ItemError: If an item cannot be prepared; the message names its row.
        """
        sides, stored = np.divmod(positions, self.count)
        if (sides != sides[0]).any():
            raise ValueError("a mini-batch has one side: expected queries or documents, found both")

        def prepare(items: Iterable[Item]) -> Features:
            return self._preprocess([self._open_item(item) for item in items], **self._options[sides[0]])

        with naming_items(self._records, map(self.item, stored), lambda item: prepare([item])):
            return prepare(map(self.item, stored))


class _MiniBatches(Dataset):
    """Dataset of mini-batches: features by the positions of the items."""

    def __init__(self, prepare: Callable[[list[int]], Features]) -> None:
        self.prepare = prepare

    def __getitems__(self, positions: list[int]) -> Features:
        return self.prepare(positions)


def _unchanged(features: Any) -> Features:
    return features


def _begin_thread(device: torch.device, cores: int) -> None:
    torch.cuda.set_device(device)  # pinned memory belongs to the current one
    torch.set_num_threads(cores)


class Feed:
    """Streams the mini-batches of a batch; only a few of them are in memory at any time.

    Args:
        prepare: Makes the features of items by their positions: :class:`ItemFeatures`, or
            :class:`~unime_st.training.prepared_items.PreparedItems`.
        workers: Processes that decode ahead of the model. Defaults to 0: decode when asked.
        threads: Threads that decode ahead of a GPU, also the first mini-batches of the next batch (see :meth:`expect`).
            Each holds one mini-batch. Defaults to 0: decode when asked.

    Example:
        >>> import tempfile
        >>> from unime_st import Item, UniME
        >>> from unime_st.data import PairRecord, RecordSet
        >>> from unime_st.training.feed import Feed, ItemFeatures
        >>> pair = PairRecord(Item("a red square"), Item("the square is red"))
        >>> records = RecordSet.write(tempfile.mkdtemp(), [pair], {})
        >>> feed = Feed(ItemFeatures(records, UniME("unime-tiny").preprocess))
        >>> [len(features["input_ids"]) for features in feed.stream([[0, 1], [1]], torch.device("cpu"))]
        [2, 1]
    """

    def __init__(self, prepare: Callable[[list[int]], Features], workers: int = 0, threads: int = 0) -> None:
        self._dataset = _MiniBatches(prepare)
        self._mini_batches: list[list[int]] = []
        self._workers, self._threads = workers, threads
        self._loader: DataLoader | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._next: list[list[int]] = []
        self._begun: dict[tuple[int, ...], Future[Features]] = {}

    def stream(self, mini_batches: Sequence[Sequence[int]], device: torch.device) -> Iterator[Features]:
        """Yield the features of mini-batches, given by the positions of their items, in order and on a device.

        Raises:
            ItemError: If an item cannot be prepared; the message names its row.
        """
        planned = [list(positions) for positions in mini_batches]
        ready: Iterable[Features]
        if self._threads and device.type == "cuda":
            ready = self._in_threads(planned, device)
        else:
            self._mini_batches[:] = planned
            if self._loader is None:
                self._loader = self._make_loader(device)
            ready = self._loader
        # A loop variable would keep the pixels alive while the model trains and while the next ones are decoded.
        yield from map(partial(send_to_device, device=device, non_blocking=True), ready)

    def expect(self, mini_batches: Sequence[Sequence[int]]) -> None:
        """Announce the next batch: threads that have nothing else to do begin with it."""
        self._next = [list(positions) for positions in mini_batches][: self._threads]

    def _in_threads(self, mini_batches: list[list[int]], device: torch.device) -> Iterator[Features]:
        """Features in order, of which at most one per thread and the next one are in memory."""
        if self._pool is None:
            share = max(1, torch.get_num_threads() // self._threads)
            self._pool = ThreadPoolExecutor(self._threads, "feed", initializer=_begin_thread, initargs=(device, share))
        coming, begun = deque(mini_batches), deque[Future[Features]]()
        try:
            while coming or begun:
                while coming and len(begun) <= self._threads:
                    positions = coming.popleft()
                    early = self._begun.pop(tuple(positions), None)
                    begun.append(early or self._pool.submit(self._pinned, positions))
                while self._next and len(begun) + len(self._begun) <= self._threads:
                    positions = self._next.pop(0)
                    self._begun[tuple(positions)] = self._pool.submit(self._pinned, positions)
                yield begun.popleft().result()
        except BaseException as error:
            stopped_at_the_end = isinstance(error, GeneratorExit) and not (coming or begun)
            if not stopped_at_the_end:  # the next batch may be another one than was announced
                for future in (*begun, *self._begun.values()):
                    future.cancel()
                self._begun, self._next = {}, []
            raise

    def _pinned(self, positions: list[int]) -> Features:
        found: Features = recursively_apply(
            lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor,
            self._dataset.prepare(positions),
        )
        return found

    def _make_loader(self, device: torch.device) -> DataLoader:
        options: dict[str, Any] = {}
        if self._workers:
            # Forked workers share the model's processor; spawned ones would each get a copy of the whole model.
            fork = "fork" in multiprocessing.get_all_start_methods()
            options = {"persistent_workers": True, "prefetch_factor": _PREFETCH}
            options |= {"multiprocessing_context": "fork"} if fork else {}
        return DataLoader(
            self._dataset,
            batch_sampler=self._mini_batches,
            collate_fn=_unchanged,
            num_workers=self._workers,
            pin_memory=device.type == "cuda",
            # A loader draws a random number when it starts, at times that depend on its workers. With a generator of its
            # own, dropout draws the same with any number of workers and after resuming.
            generator=torch.Generator(),
            **options,
        )
