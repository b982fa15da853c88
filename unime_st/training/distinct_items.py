"""Training on distinct items: each item of a batch is decoded late, embedded once and used in every column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext
from sentence_transformers.cross_encoder.data_collator import CrossEncoderDataCollator
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from unime_st.backbones.last_token import only_last_tokens
from unime_st.data.items import Item
from unime_st.data.parquet_shards import Row
from unime_st.data.records import RecordSet
from unime_st.encoding.batch_runner import needs_last_tokens_only
from unime_st.encoding.model_inputs import Features
from unime_st.losses.base import CachedEmbeddingLoss, whole_columns
from unime_st.losses.quantization import Precision, fake_quantize
from unime_st.memory import HeapTrimmer
from unime_st.training.feed import Feed, ItemFeatures
from unime_st.training.frozen_tower import FrozenTowerCache
from unime_st.training.item_errors import naming_items
from unime_st.training.item_prompts import ItemPrompts
from unime_st.training.mini_batches import MiniBatches

COLUMNS = "columns"
"""Feature of the first bucket: index of the distinct item in each column and row of the batch."""


@dataclass
class ItemCollator(SentenceTransformerDataCollator):
    """Collates rows of item ids to the distinct items of the batch, in mini-batches of similar length.

    Args:
        preprocess_fn: ``model.preprocess``.
        records: The record folder of the ids.
        mini_batches: Splits the distinct items into mini-batches.
        item_prompts: Sides of the items. Defaults to None: queries and documents have no prompts.
        lazy: Collate positions only; the feed of :class:`DistinctItemsLoss` decodes each mini-batch when it is due, so
            that memory does not grow with the batch. False (default) decodes in the collator, thus in the workers of
            the data loader: for small batches that are embedded in one pass.
        prepare: Makes the features of items by their positions. Defaults to None: items are decoded, then
            ``preprocess_fn`` makes them.
        expect: With ``lazy``, is told the mini-batches of a batch when it is collated, thus before it is trained. Defaults
            to None.
    """

    records: RecordSet | None = None
    mini_batches: MiniBatches = field(default_factory=lambda: MiniBatches(np.empty(0)))
    item_prompts: ItemPrompts | None = None
    lazy: bool = False
    prepare: Callable[[list[int]], Features] | None = None
    expect: Callable[[list[list[int]]], None] | None = None

    def __call__(self, features: list[Row]) -> Features:
        """Collate rows with the columns ``query, positive, negative_1, ...`` of item ids, and optionally ``label``."""
        assert self.records is not None
        names = [name for name in features[0] if name != "label"]
        table = self.records.items.positions([row[name] for row in features for name in names])
        table = table.reshape(len(features), len(names))
        table = table if self.item_prompts is None else self.item_prompts.positions(names, table)
        positions, indices = np.unique(table.T, return_inverse=True)
        groups = self.mini_batches(positions)
        order = np.concatenate(groups)
        where = np.empty_like(order)
        where[order] = np.arange(len(order))
        columns = torch.from_numpy(where[indices].reshape(len(names), len(features)))
        batch = self._planned(positions[order], groups) if self.lazy else self._decoded(positions, groups)
        batch[f"bucket0_{COLUMNS}"] = columns
        if "label" in features[0]:
            batch["label"] = torch.tensor(np.array([row["label"] for row in features]))
        return batch

    def _decoded(self, positions: np.ndarray, groups: list[np.ndarray]) -> Features:
        assert self.records is not None
        prepare, batch = self.prepare or ItemFeatures(self.records, self.preprocess_fn), {}
        for number, group in enumerate(groups):
            inputs = prepare(positions[group].tolist())
            batch.update({f"bucket{number}_{name}": value for name, value in inputs.items()})
        return batch

    def _planned(self, positions: np.ndarray, groups: list[np.ndarray]) -> Features:
        parts = np.split(positions, np.cumsum([len(group) for group in groups])[:-1])
        if self.expect:
            self.expect([part.tolist() for part in parts])
        return {
            "bucket0_input_ids": torch.from_numpy(positions)[:, None],  # the trainer recognizes inputs by this name
            "bucket0_sizes": torch.tensor([len(group) for group in groups]),
            "bucket0_kept": torch.tensor([self.mini_batches.count_kept(parts)]),
        }


class DistinctItemsLoss(CachedLossMixin, nn.Module):
    """Embeds the distinct items of a batch once and computes any embedding loss on its columns.

    With a feed gradients are cached (https://huggingface.co/papers/2101.06983), and only a few mini-batches are
    decoded at a time; without one each bucket is one forward pass. The first mini-batches, as far as they are one of full
    size together, are embedded once: their activations, for which there has to be memory anyway, are kept for the backward
    pass. Value and gradient equal those of the inner loss on columns that are embedded one by one.

    Args:
        loss: A loss with ``calculate_loss(reps, labels, with_backward=...)``, as all cached losses have.
        feed: Decodes the mini-batches of a lazy :class:`ItemCollator`.
        matryoshka_dims: Train the mean of the losses of these prefixes of the embedding. None (default): the whole
            embedding.
        precisions: Train the mean of the losses of the embedding and of its roundings to these precisions, for each
            prefix. None (default): the embedding alone.
        frozen_tower: Runs a frozen vision tower once a step. None (default): the vision tower runs in both passes.

    Attributes:
        tokens: Tokens that this process has embedded so far, without padding and without second passes.
        items: Distinct items that this process has embedded so far.
    """

    uses_gradient_cache = True
    mini_batch_size = 1  # the mixin's inputs are planned mini-batches here

    def __init__(
        self,
        loss: Any,
        feed: Feed | None = None,
        matryoshka_dims: list[int] | None = None,
        frozen_tower: FrozenTowerCache | None = None,
        precisions: Sequence[Precision] | None = None,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.feed = feed
        self.matryoshka_dims = matryoshka_dims
        self.precisions = list(precisions or [])
        self.frozen_tower = frozen_tower
        self._heap_trimmer = HeapTrimmer()
        self.tokens = self.items = 0
        self._columns = torch.empty(0, dtype=torch.long)
        self._stream: Iterator[Features] = iter(())
        self._planned: list[list[int]] = []
        self._scheduled: list[tuple[int, bool]] = []  # mini-batches that the stream will yield; True: second pass
        self._step_cache: FrozenTowerCache | None = None
        self._kept = 0  # number of first mini-batches that are embedded once
        self._graphs: dict[int, Tensor] = {}  # their embeddings, with the graph
        self._last_only: bool | None = None
        self._used = 0

    @property
    def model(self) -> Any:  # type: ignore[override]
        """The model of the inner loss. The trainer replaces it by a wrapped one on several devices."""
        return self.loss.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self.loss.model = model

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Loss of the buckets of :class:`ItemCollator`."""
        buckets = [dict(features) for features in sentence_features]
        self._columns = buckets[0].pop(COLUMNS)
        if "sizes" in buckets[0]:
            return self._forward_lazy(buckets[0], labels)
        self._used = len(buckets)
        for bucket in buckets:
            self._count(bucket)
        buckets += buckets[-1:] * (self._most_of_any_process(len(buckets)) - len(buckets))
        parts = []
        for bucket in buckets:
            with self._pooled_tokens(bucket):
                parts.append(self.model(dict(bucket))["sentence_embedding"])
        loss = self.calculate_loss([parts], labels)
        for repeated in parts[self._used :]:
            loss = loss + repeated[:0].sum()  # adds 0, but has a backward pass
        return loss

    def _forward_lazy(self, batch: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        if self.feed is None:
            raise ValueError("DistinctItemsLoss got a lazily collated batch, but has no feed to decode it: pass feed.")
        sizes = batch["sizes"].tolist()
        planned = [part[:, 0].tolist() for part in batch["input_ids"].cpu().split(sizes)]
        self._used = len(planned)
        planned += planned[-1:] * (self._most_of_any_process(len(planned)) - len(planned))
        self._heap_trimmer.begin()
        self._planned = planned
        scheduled = [(number, False) for number in range(len(planned))]
        self._step_cache, self._kept, self._graphs = None, 0, {}
        if torch.is_grad_enabled():
            sharded = isinstance(next(self.model.parameters()), DTensor)
            # DDP and FSDP prepare the backward pass of one forward pass at a time.
            if not sharded and not isinstance(self.model, DistributedDataParallel):
                self._kept = int(batch["kept"])
            # Sharded weights are gathered while the model itself runs, not while its vision tower runs alone.
            self._step_cache = None if sharded else self.frozen_tower
            if self._step_cache:
                self._step_cache.begin()
            else:
                scheduled += [(number, True) for number in range(self._kept, len(planned))]
        self._start(scheduled)
        loss = self.forward_cached([{"input_ids": torch.arange(len(planned))[:, None]}], labels)
        if isinstance(self.loss, CachedEmbeddingLoss):
            loss = self.loss.attach_own_gradients(loss, 1 / self._views)
        return loss

    def _most_of_any_process(self, count: int) -> int:
        """Number of forward passes: with sharded weights, which each pass gathers, the same for all processes."""
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
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        """Embed planned mini-batch number ``begin``. See :class:`CachedLossMixin`."""
        self._heap_trimmer.trim(
            "gradient" if with_grad else "forward", self._step_cache.host_bytes if self._step_cache else 0
        )
        if with_grad and begin in self._graphs:
            return self._graphs.pop(begin), random_state
        if self._step_cache and with_grad and begin in self._step_cache:
            features = self._step_cache[begin]
        else:
            features = self._features(begin, with_grad)
        if not with_grad:
            self._count(features)
        count = len(self._planned[begin])
        keeps = not with_grad and begin < self._kept
        with self._pooled_tokens(features):
            found = super().embed_minibatch(features, 0, count, with_grad or keeps, copy_random_state, random_state)
        if keeps:
            self._graphs[begin] = found[0]
        return found

    def _pooled_tokens(self, features: Features) -> AbstractContextManager[None]:
        """Context in which the last layer runs for the pooled tokens only, where the model pools last tokens."""
        if self._last_only is None:
            model = getattr(self.model, "module", self.model)
            # Recomputed activations would be those of all tokens.
            recomputed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
            self._last_only = not recomputed and needs_last_tokens_only(model)
        return only_last_tokens(features["attention_mask"]) if self._last_only else nullcontext()

    def _start(self, scheduled: list[tuple[int, bool]]) -> None:
        """Let the feed prepare these mini-batches in order."""
        assert self.feed is not None
        self._scheduled = scheduled
        self._stream = self.feed.stream([self._planned[number] for number, _ in scheduled], self._columns.device)

    def _features(self, begin: int, with_grad: bool) -> Features:
        if self._step_cache and with_grad and not self._scheduled:
            self._start([(n, True) for n in range(begin, len(self._planned)) if n not in self._step_cache])
        if self._scheduled[:1] == [(begin, with_grad)]:
            features = next(self._stream)
            del self._scheduled[0]
        else:  # not scheduled: the mixin repeats a mini-batch so that DDP synchronizes
            assert self.feed is not None
            features = next(self.feed.stream([self._planned[begin]], self._columns.device))
        keep = not with_grad and begin >= self._kept
        return self._step_cache.encode_images(begin, features, keep=keep) if self._step_cache else features

    def _count(self, features: Features) -> None:
        if "attention_mask" in features:
            self.tokens += int(features["attention_mask"].sum())
            self.items += len(features["attention_mask"])

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Compute the inner loss from the embeddings of the distinct items. See :class:`CachedLossMixin`."""
        parts = reps[0]
        embeddings = torch.cat(parts[: self._used])
        columns = [embeddings[rows] for rows in self._columns]
        if not with_backward:
            return self._over_views(columns, labels, with_backward=False)
        leaves = [column.detach().requires_grad_() for column in columns]
        loss = self._over_views(leaves, labels, with_backward=True)
        torch.autograd.backward(columns, [leaf.grad for leaf in leaves])
        for repeated in parts[self._used :]:
            repeated.grad = torch.zeros_like(repeated)
        return loss

    @property
    def _views(self) -> int:
        """Number of prefixes and precisions that the embedding is trained in."""
        return len(self.matryoshka_dims or [0]) * (1 + len(self.precisions))

    def _over_views(self, columns: list[Tensor], labels: Tensor | None, with_backward: bool) -> Tensor:
        if self._views == 1 and self.matryoshka_dims is None:
            return self.loss.calculate_loss([[column] for column in columns], labels, with_backward=with_backward)
        count, total = self._views, columns[0].new_zeros(())
        with whole_columns(self.loss, columns):
            for dim in self.matryoshka_dims or [columns[0].shape[1]]:
                prefixes = [column[:, :dim] for column in columns]
                for view in (prefixes, *(fake_quantize(prefixes, precision) for precision in self.precisions)):
                    parts = [[column] for column in view]
                    total = total + self.loss.calculate_loss(parts, labels, with_backward=with_backward) / count
        if with_backward:
            for column in columns:
                assert column.grad is not None
                column.grad.div_(count)
        return total

    def get_config_dict(self) -> dict[str, object]:
        """Name and options of the inner loss, for the model card."""
        extra: dict[str, object] = {"matryoshka_dims": self.matryoshka_dims} if self.matryoshka_dims else {}
        extra |= {"precisions": self.precisions} if self.precisions else {}
        return {"loss": type(self.loss).__name__, **self.loss.get_config_dict(), **extra}


@dataclass
class RerankerItemCollator(CrossEncoderDataCollator):
    """Collates rows of item ids to columns of items, whose images the loss decodes mini-batch by mini-batch.

    Args:
        preprocess_fn: ``model.preprocess``.
        records: The record folder of the ids.
    """

    records: RecordSet | None = None

    def __call__(self, features: list[Row]) -> Features:
        """Collate rows with the columns ``query, positive, negative_1, ...`` of item ids, and optionally ``label``."""
        assert self.records is not None
        find: Callable[[str], Item] = self.records.item
        rows = [{name: value if name == "label" else find(value) for name, value in row.items()} for row in features]
        return super().__call__(rows)

    def naming_items(self, items: Iterable[Item]) -> AbstractContextManager[None]:
        """Context of the loss on these items, in which an error names the one that cannot be prepared."""
        assert self.records is not None
        # The loss makes prompts of items; an item that fails does so in the simplest of them.
        return naming_items(self.records, items, lambda item: self.preprocess_fn([(item.to_input(), "0")]))
