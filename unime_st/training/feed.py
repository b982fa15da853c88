"""Feed: mini-batches of items, decoded and processed in the background just before the model needs them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset

from unime_st.data.images import BadImageError
from unime_st.data.items import Item
from unime_st.data.records import ItemFolder
from unime_st.encoding.model_inputs import Features

_PREFETCH = 2  # mini-batches that each worker keeps ready


def item_features(
    records: ItemFolder,
    preprocess: Callable[[list[Any]], Features],
    open_item: Callable[[Item], object],
    positions: Sequence[int],
) -> Features:
    """Open the items at these positions and preprocess them; a BadImageError names the item."""
    inputs = []
    for position in positions:
        item = records.items.at(int(position))
        try:
            inputs.append(open_item(item))
        except BadImageError as error:
            raise BadImageError(f"{records.folder}, item {item.id} (stored as {position}): {error}") from error
    return preprocess(inputs)


class _MiniBatches(Dataset):
    """Dataset of mini-batches: features by the positions of the items."""

    def __init__(self, prepare: Callable[[list[int]], Features]) -> None:
        self.prepare = prepare

    def __getitems__(self, positions: list[int]) -> Features:
        return self.prepare(positions)


def _unchanged(features: Any) -> Features:
    return features


class Feed:
    """Streams the mini-batches of a batch; only a few of them are in memory at any time.

    Args:
        records: The record folder of the items.
        preprocess: ``model.preprocess``.
        workers: Processes that decode ahead of the model. Defaults to 0: decode when asked.
        open_item: Converts an item to an input of ``preprocess``. Defaults to decoding it.
        prepare: Makes the features of items by their positions, such as
            :class:`~unime_st.training.prepared_items.PreparedItems`. None (default): ``open_item``, then ``preprocess``.

    Example:
        >>> import tempfile
        >>> from unime_st import Item, UniME
        >>> from unime_st.data import PairRecord, RecordSet
        >>> from unime_st.training.feed import Feed
        >>> pair = PairRecord(Item("a red square"), Item("the square is red"))
        >>> records = RecordSet.write(tempfile.mkdtemp(), [pair], {})
        >>> feed = Feed(records, UniME("unime-tiny").preprocess)
        >>> [len(features["input_ids"]) for features in feed.stream([[0, 1], [1]], torch.device("cpu"))]
        [2, 1]
    """

    def __init__(
        self,
        records: ItemFolder,
        preprocess: Callable[[list[Any]], Features],
        workers: int = 0,
        open_item: Callable[[Item], object] = Item.to_input,
        prepare: Callable[[list[int]], Features] | None = None,
    ) -> None:
        self._dataset = _MiniBatches(prepare or partial(item_features, records, preprocess, open_item))
        self._mini_batches: list[list[int]] = []
        self._workers = workers
        self._loader: DataLoader | None = None

    def stream(self, mini_batches: Sequence[Sequence[int]], device: torch.device) -> Iterator[Features]:
        """Yield the features of mini-batches, given by the positions of their items, in order and on a device.

        Raises:
            BadImageError: If an image cannot be decoded; the message names the item.
        """
        self._mini_batches[:] = [list(positions) for positions in mini_batches]
        if self._loader is None:
            self._loader = self._make_loader(device)
        # A loop variable would keep the pixels alive while the model trains and while the next ones are decoded.
        yield from map(partial(send_to_device, device=device, non_blocking=True), self._loader)

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
