"""Trains on item ids: each distinct item of a batch is decoded late, embedded once, and used wherever it occurs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from sentence_transformers.cross_encoder.data_collator import CrossEncoderDataCollator
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor, nn

from unime_st.data.items import Item
from unime_st.data.records import RecordSet

COLUMNS = "columns"  # feature of the first bucket: which item stands where in the batch
_PADDING_TOLERANCE = 1.6  # a bucket holds items up to this many times as long as its shortest


def _text_length(item: Item) -> int:
    return len(item.text or "")


def _buckets(items: list[Item]) -> list[list[int]]:
    """Groups of item positions with and without pictures, of like length, so that little is padded."""
    groups: list[list[int]] = []
    for with_picture in (True, False):
        members = [index for index, item in enumerate(items) if (item.image is not None) == with_picture]
        members.sort(key=lambda index: _text_length(items[index]))
        shortest = 0.0
        for index in members:
            length = _text_length(items[index]) + 40.0  # what a template and a picture add, in characters
            if not shortest or length > _PADDING_TOLERANCE * shortest:
                groups.append([])
                shortest = length
            groups[-1].append(index)
    return groups


def distinct_positives(dataset: Dataset, valid_label_columns: list[str] | None = None, **options: Any) -> Any:
    """Batch sampler: no query and no positive comes twice in a batch, or it would be its own in-batch negative.

    Mined negatives may be shared; they are no in-batch negatives of other rows.
    """
    ignored = [name for name in dataset.column_names if name not in ("query", "positive")]
    return NoDuplicatesBatchSampler(dataset, valid_label_columns=ignored, **options)


@dataclass
class ItemCollator(SentenceTransformerDataCollator):
    """Turns rows of item ids into features of the distinct items, in buckets of like length.

    Args:
        preprocess_fn: ``model.preprocess``.
        records: Where the ids lead; pictures are decoded here, in the data loader's workers if there are any.
    """

    records: RecordSet | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows with columns ``query, positive, negative_1, ...`` of ids and an optional ``label``."""
        assert self.records is not None
        names = [name for name in features[0] if name != "label"]
        place: dict[str, int] = {}
        columns = [[place.setdefault(row[name], len(place)) for row in features] for name in names]
        items = [self.records.item(item_id) for item_id in place]
        groups = _buckets(items)
        order = {index: position for position, index in enumerate(index for group in groups for index in group)}
        batch: dict[str, Any] = {}
        for number, group in enumerate(groups):
            inputs = self.preprocess_fn([items[index].to_input() for index in group])
            batch.update({f"bucket{number}_{name}": value for name, value in inputs.items()})
        batch[f"bucket0_{COLUMNS}"] = torch.tensor([[order[index] for index in column] for column in columns])
        if "label" in features[0]:
            batch["label"] = torch.tensor([row["label"] for row in features])
        return batch


class DistinctItemsLoss(CachedLossMixin, nn.Module):
    """Embeds the distinct items of a batch once and hands any embedding loss its columns.

    With ``mini_batch_size`` the gradients are cached (https://huggingface.co/papers/2101.06983), else each bucket is
    one forward pass. Value and gradient are those of the inner loss on columns embedded one by one.

    Args:
        loss: A loss with ``calculate_loss(reps, labels, with_backward=...)``, as all cached losses have.
        mini_batch_size: Items embedded at a time; None (default) turns gradient caching off.
    """

    mini_batch_size: int | None  # type: ignore[assignment]  # None where the cache is off

    def __init__(self, loss: Any, mini_batch_size: int | None = None) -> None:
        super().__init__()
        self.loss: Any = loss
        self.mini_batch_size = mini_batch_size
        self.uses_gradient_cache = mini_batch_size is not None
        self._columns = torch.empty(0, dtype=torch.long)

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
        if self.uses_gradient_cache:
            return self.forward_cached(buckets, labels)
        return self.calculate_loss([[self.model(bucket)["sentence_embedding"]] for bucket in buckets], labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Inner loss of the batch, from the embeddings of the distinct items."""
        embeddings = torch.cat([part for bucket in reps for part in bucket])
        columns = [embeddings[rows] for rows in self._columns]
        if not with_backward:
            return self.loss.calculate_loss([[column] for column in columns], labels)
        leaves = [column.detach().requires_grad_() for column in columns]
        loss = self.loss.calculate_loss([[leaf] for leaf in leaves], labels, with_backward=True)
        torch.autograd.backward(columns, [leaf.grad for leaf in leaves])
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """The inner loss and its options, for the model card."""
        return {"loss": type(self.loss).__name__, **self.loss.get_config_dict()}


@dataclass
class RerankerItemCollator(CrossEncoderDataCollator):
    """Turns rows of item ids into rows of items, whose pictures the loss decodes mini-batch by mini-batch."""

    records: RecordSet | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows with columns ``query, positive, negative_1, ...`` of ids and an optional ``label``."""
        assert self.records is not None
        find: Callable[[str], Item] = self.records.item
        rows = [{name: value if name == "label" else find(value) for name, value in row.items()} for row in features]
        return super().__call__(rows)
