"""Trains on item ids: each distinct item of a batch is decoded late, embedded once, and used wherever it occurs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.cross_encoder.data_collator import CrossEncoderDataCollator
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from unime_st.data.items import Item
from unime_st.data.records import RecordSet
from unime_st.training.feed import Feed
from unime_st.training.frozen_tower import FrozenTowerCache
from unime_st.training.heap import HeapTrimmer
from unime_st.training.mini_batches import MiniBatches

COLUMNS = "columns"
"""Feature of the first bucket: which item stands where in the batch."""


@dataclass
class ItemCollator(SentenceTransformerDataCollator):
    """Turns rows of item ids into the distinct items of the batch, in mini-batches of like length.

    Args:
        preprocess_fn: ``model.preprocess``.
        records: Where the ids lead.
        mini_batches: How the distinct items are cut up.
        lazy: Hand on positions only; :class:`DistinctItemsLoss` has its feed decode mini-batch after mini-batch, so
            that memory does not grow with the batch. False decodes here, in the data loader's workers if there are
            any: right for small batches that are embedded in one pass.
        open_item: Makes of an item what ``preprocess_fn`` takes. Defaults to decoding it.
    """

    records: RecordSet | None = None
    mini_batches: MiniBatches = field(default_factory=lambda: MiniBatches(np.empty(0)))
    lazy: bool = False
    open_item: Callable[[Item], Any] = Item.to_input

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows with columns ``query, positive, negative_1, ...`` of ids and an optional ``label``."""
        assert self.records is not None
        names = [name for name in features[0] if name != "label"]
        table = self.records.items.positions([row[name] for name in names for row in features])
        positions, indices = np.unique(table, return_inverse=True)
        groups = self.mini_batches(positions)
        order = np.concatenate(groups)
        where = np.empty_like(order)
        where[order] = np.arange(len(order))
        columns = torch.from_numpy(where[indices].reshape(len(names), len(features)))
        batch = self._decoded(positions, groups) if not self.lazy else self._planned(positions[order], groups)
        batch[f"bucket0_{COLUMNS}"] = columns
        if "label" in features[0]:
            batch["label"] = torch.tensor(np.array([row["label"] for row in features]))
        return batch

    def _decoded(self, positions: np.ndarray, groups: list[np.ndarray]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for number, group in enumerate(groups):
            items = [self.records.items.at(int(position)) for position in positions[group]]  # type: ignore[union-attr]
            inputs = self.preprocess_fn([self.open_item(item) for item in items])
            batch.update({f"bucket{number}_{name}": value for name, value in inputs.items()})
        return batch

    def _planned(self, positions: np.ndarray, groups: list[np.ndarray]) -> dict[str, Any]:
        return {
            "bucket0_input_ids": torch.from_numpy(positions)[:, None],  # the name by which the trainer knows inputs
            "bucket0_sizes": torch.tensor([len(group) for group in groups]),
        }


class DistinctItemsLoss(CachedLossMixin, nn.Module):
    """Embeds the distinct items of a batch once and hands any embedding loss its columns.

    With a feed, gradients are cached (https://huggingface.co/papers/2101.06983) and no more than a few mini-batches
    are decoded at a time; without, each bucket is one forward pass. Value and gradient are those of the inner loss on
    columns embedded one by one.

    Args:
        loss: A loss with ``calculate_loss(reps, labels, with_backward=...)``, as all cached losses have.
        feed: Decodes the mini-batches that a lazy :class:`ItemCollator` planned.
        matryoshka_dims: Train the mean of the losses of these prefixes of the embedding. Defaults to the whole.
        vision: Runs a frozen vision tower once a step. Defaults to None: it is a part of the model as others are.

    Attributes:
        tokens: Tokens embedded so far by this process, padding not counted; second passes neither.
        items: Distinct items embedded so far by this process.
    """

    uses_gradient_cache = True
    mini_batch_size = 1  # of planned mini-batches: what the mixin takes for inputs

    def __init__(
        self,
        loss: Any,
        feed: Feed | None = None,
        matryoshka_dims: list[int] | None = None,
        vision: FrozenTowerCache | None = None,
    ) -> None:
        super().__init__()
        self.loss: Any = loss
        self.feed = feed
        self.matryoshka_dims = matryoshka_dims
        self.vision = vision
        self._heap = HeapTrimmer()
        self.tokens = self.items = 0
        self._columns = torch.empty(0, dtype=torch.long)
        self._stream: Iterator[dict[str, Any]] = iter(())
        self._planned: list[list[int]] = []
        self._turns: list[tuple[int, bool]] = []  # mini-batches that the stream will give, and for which pass
        self._once: FrozenTowerCache | None = None
        self._used = 0

    @property
    def model(self) -> Any:  # type: ignore[override]
        """The model of the inner loss; the trainer replaces it by a wrapped one on several devices."""
        return self.loss.model

    @model.setter
    def model(self, model: Any) -> None:
        self.loss.model = model

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Loss of one batch from :class:`ItemCollator`."""
        buckets = [dict(features) for features in sentence_features]
        self._columns = buckets[0].pop(COLUMNS)
        if "sizes" in buckets[0]:
            return self._forward_lazy(buckets[0], labels)
        self._used = len(buckets)
        for bucket in buckets:
            self._count(bucket)
        buckets += buckets[-1:] * (self._most_of_any_process(len(buckets)) - len(buckets))
        parts = [self.model(dict(bucket))["sentence_embedding"] for bucket in buckets]
        loss = self.calculate_loss([parts], labels)
        for repeated in parts[self._used :]:
            loss = loss + repeated[:0].sum()  # nothing, but its backward pass takes place
        return loss

    def _forward_lazy(self, batch: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        if self.feed is None:
            raise ValueError("This batch was collated lazily: give DistinctItemsLoss a feed that decodes it.")
        sizes = batch["sizes"].tolist()
        planned = [part[:, 0].tolist() for part in batch["input_ids"].cpu().split(sizes)]
        self._used = len(planned)
        planned += planned[-1:] * (self._most_of_any_process(len(planned)) - len(planned))
        self._heap.begin()
        self._planned = planned
        turns = [(number, False) for number in range(len(planned))]
        self._once = None
        if torch.is_grad_enabled():
            # Sharded weights are whole only while the model itself runs, not its vision tower alone.
            self._once = None if isinstance(next(self.model.parameters()), DTensor) else self.vision
            if self._once:
                self._once.begin()
            else:
                turns += [(number, True) for number in range(len(planned))]
        self._start(turns)
        return self.forward_cached([{"input_ids": torch.arange(len(planned))[:, None]}], labels)

    def _most_of_any_process(self, count: int) -> int:
        """Sharded weights are gathered in every forward pass, so all processes need as many; DDP does without."""
        if not dist.is_initialized() or dist.get_world_size() == 1 or isinstance(self.model, DistributedDataParallel):
            return count
        most = torch.tensor([count], device=self._columns.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Tensor],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: Any = None,
    ) -> tuple[Tensor, Any]:
        """Embed planned mini-batch number ``begin``, see :class:`CachedLossMixin`."""
        self._heap.trim("gradient" if with_grad else "forward", self._once.host_bytes if self._once else 0)
        if self._once and with_grad and begin in self._once:
            features = self._once[begin]
        else:
            features = self._features(begin, with_grad)
        if not with_grad:
            self._count(features)
        count = len(self._planned[begin])
        return super().embed_minibatch(features, 0, count, with_grad, copy_random_state, random_state)

    def _start(self, turns: list[tuple[int, bool]]) -> None:
        """Let the feed work ahead on these mini-batches."""
        assert self.feed is not None
        self._turns = turns
        self._stream = self.feed.stream([self._planned[number] for number, _ in turns], self._columns.device)

    def _features(self, begin: int, with_grad: bool) -> dict[str, Any]:
        if self._once and with_grad and not self._turns:
            self._start([(n, True) for n in range(begin, len(self._planned)) if n not in self._once])
        if self._turns[:1] == [(begin, with_grad)]:
            features = next(self._stream)
            del self._turns[0]
        else:  # out of turn: the mixin repeats a mini-batch to let DDP synchronise
            assert self.feed is not None
            features = next(self.feed.stream([self._planned[begin]], self._columns.device))
        return self._once.encode_images(begin, features, keep=not with_grad) if self._once else features

    def _count(self, features: dict[str, Any]) -> None:
        if "attention_mask" in features:
            self.tokens += int(features["attention_mask"].sum())
            self.items += len(features["attention_mask"])

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Inner loss of the batch, from the embeddings of the distinct items."""
        parts = reps[0]
        embeddings = torch.cat(parts[: self._used])
        columns = [embeddings[rows] for rows in self._columns]
        if not with_backward:
            return self._over_prefixes(columns, labels, with_backward=False)
        leaves = [column.detach().requires_grad_() for column in columns]
        loss = self._over_prefixes(leaves, labels, with_backward=True)
        torch.autograd.backward(columns, [leaf.grad for leaf in leaves])
        for repeated in parts[self._used :]:
            repeated.grad = torch.zeros_like(repeated)
        return loss

    def _over_prefixes(self, columns: list[Tensor], labels: Tensor | None, with_backward: bool) -> Tensor:
        if self.matryoshka_dims is None:
            return self.loss.calculate_loss([[column] for column in columns], labels, with_backward=with_backward)
        count = len(self.matryoshka_dims)
        total = columns[0].new_zeros(())
        for dim in self.matryoshka_dims:
            prefixes = [[column[:, :dim]] for column in columns]
            total = total + self.loss.calculate_loss(prefixes, labels, with_backward=with_backward) / count
        if with_backward:
            for column in columns:
                assert column.grad is not None
                column.grad.div_(count)
        return total

    def get_config_dict(self) -> dict[str, Any]:
        """The inner loss and its options, for the model card."""
        extra = {"matryoshka_dims": self.matryoshka_dims} if self.matryoshka_dims else {}
        return {"loss": type(self.loss).__name__, **self.loss.get_config_dict(), **extra}


@dataclass
class RerankerItemCollator(CrossEncoderDataCollator):
    """Turns rows of item ids into rows of items, whose images the loss decodes mini-batch by mini-batch."""

    records: RecordSet | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows with columns ``query, positive, negative_1, ...`` of ids and an optional ``label``."""
        assert self.records is not None
        find: Callable[[str], Item] = self.records.item
        rows = [{name: value if name == "label" else find(value) for name, value in row.items()} for row in features]
        return super().__call__(rows)
