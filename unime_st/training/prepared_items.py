"""Prepared items: token ids, positions and pixels or visual tokens of items, kept across steps and epochs."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from sentence_transformers.base.model import BaseModel
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence

from unime_st.backbones.visual_outputs import backbone_of
from unime_st.encoding.model_inputs import Features, same_features
from unime_st.training.feed import ItemFeatures
from unime_st.training.visual_tokens import (
    ROTARY_POSITIONS,
    VISUAL_TOKENS,
    compute_visual_tokens,
    inject_visual_tokens,
    is_frozen,
    tensors_of,
)

logger = logging.getLogger(__name__)
_BY_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
_BY_IMAGE = ("pixel_values", "image_grid_thw", "image_sizes")
_IMAGE_COUNTS = ("num_images_per_sample", "batch_num_images")
_KNOWN = {*_BY_TOKEN, *_BY_IMAGE, *_IMAGE_COUNTS, VISUAL_TOKENS, "modality"}
_PROBES = 8  # items whose batch is compared with that of the model
_TENSOR_BYTES = 512  # of a tensor object and its allocation, beside the values
Row = dict[str, Any]
"""Features of one item: tensors ``(1, tokens)``, ``(images, ...)``, ``(1, 3, tokens)``; visual tokens as lists."""


class PreparedItems:
    """Makes the features of mini-batches of stored items, each item prepared once.

    Decoding, image processing, the chat template and tokenization depend on the item alone. So do the rotary positions
    of Qwen's families and, where vision tower and projector are frozen, the visual tokens, which replace the pixels.
    Items are kept in the order in which they come, until ``max_bytes`` are full; the others are prepared every time.

    Args:
        model: The model that is trained.
        features: Makes the features of stored items.
        max_bytes: Memory of the kept items in this process, that of the tensor objects included.
        positions: Positions of the items in use, some of which are tried. None (default): all.
        dtype: The dtype that autocast computes in. Defaults to float32.

    Attributes:
        usable: Single items, put together, give the batch that ``features`` gives. Otherwise nothing is kept.
        prepared: Items prepared so far; one that is not kept counts each time.

    Example:
        >>> import tempfile
        >>> from unime_st import UniME
        >>> from unime_st.data.records import RecordSet
        >>> from unime_st.data.scenes import training_records
        >>> from unime_st.training.feed import ItemFeatures
        >>> from unime_st.training.prepared_items import PreparedItems
        >>> records, model = RecordSet.write(tempfile.mkdtemp(), training_records(1), {}), UniME("unime-tiny")
        >>> items = PreparedItems(model, ItemFeatures(records, model.preprocess), max_bytes=1 << 20)
        >>> items([0, 1])["input_ids"].shape[0], items([1])["input_ids"].shape[0], items.prepared
        (2, 1, 2)
    """

    def __init__(
        self,
        model: BaseModel,
        features: ItemFeatures,
        max_bytes: int,
        positions: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._model, self._features = model, features
        self.max_bytes, self._dtype = max_bytes, dtype
        self._kept: dict[int, Row] = {}
        self.nbytes = self.prepared = 0
        self._frozen = is_frozen(model)
        self.usable = True
        if not self._same_in_batches(range(features.count) if positions is None else positions):
            self._give_up()
        model.register_forward_pre_hook(inject_visual_tokens)

    def __call__(self, positions: Sequence[int]) -> Features:
        """Features of the items at these positions, as one mini-batch.

        Raises:
            ItemError: If an item cannot be prepared; the message names its row.
        """
        missing = [position for position in dict.fromkeys(positions) if position not in self._kept]
        fresh = dict(zip(missing, self._prepare(missing))) if self.usable and missing else {}
        if not self.usable:
            return self._features(positions)
        for position, row in fresh.items():
            size = sum(tensor.nbytes + _TENSOR_BYTES for tensor in tensors_of(row))
            if self.nbytes + size <= self.max_bytes:
                self.nbytes += size
                self._kept[position] = row
        return self._merged([fresh[p] if p in fresh else self._kept[p] for p in positions])

    def _give_up(self) -> None:
        self.usable, self.nbytes = False, 0
        self._kept.clear()
        logger.warning("item_cache has no effect: batches of this model and dataset are more than their single items.")

    def _same_in_batches(self, positions: Sequence[int]) -> bool:
        """Whether a few items, with images and without, make the batch alone that they make cut out of a larger one."""
        found: dict[bool, list[int]] = {True: [], False: []}
        for position in positions[: 64 * _PROBES]:
            kind = found[self._features.item(position).image is None]
            if len(kind) < _PROBES // 2:
                kind.append(int(position) % self._features.count)  # a mini-batch has one side
        probes = found[True] + found[False]
        rows = self._rows(probes)
        if rows is None:
            return False
        return same_features(self._merged(rows[::2]), self._features(probes[::2]))

    def _rows(self, positions: list[int]) -> list[Row] | None:
        """Features of each item; None if they cannot be cut out of those of a batch."""
        batch = self._features(positions)
        # LLaVA's processors pad the crops of a batch to the most that an image has.
        if not batch.keys() <= _KNOWN or ("pixel_values" in batch and "image_grid_thw" not in batch):
            return None
        rows: list[Row] = [{} for _ in positions]
        images = [self._features.item(position).image is not None for position in positions]
        with_image = [row for row, image in zip(rows, images) if image]
        for name, value in batch.items():
            owners, parts = rows, [value] * len(rows)
            if name in _BY_TOKEN:
                parts = [tokens[mask.bool()][None] for tokens, mask in zip(value, batch["attention_mask"])]
            elif name in _IMAGE_COUNTS:
                owners, parts = with_image, value[torch.tensor(images)].split(1) if any(images) else []
            elif name == "pixel_values":
                owners, parts = with_image, value.split(batch["image_grid_thw"].prod(dim=1).tolist())
            elif name in _BY_IMAGE:
                owners, parts = with_image, value.split(1)
            elif name == VISUAL_TOKENS:
                ids = batch["input_ids"] == backbone_of(self._model).config.image_token_id
                counts = ids.sum(dim=1)[torch.tensor(images)].tolist()
                owners, parts = with_image, list(zip(*(layer.split(counts) for layer in value)))
            if len(parts) != len(owners):
                return None
            for row, part in zip(owners, parts):
                row[name] = list(part) if name == VISUAL_TOKENS else part
        return rows

    def _prepare(self, positions: list[int]) -> list[Row]:
        rows = self._rows(positions)
        if rows is None:
            self._give_up()
            return []
        self.prepared += len(positions)
        batch = self._merged(rows)
        self._add_positions(rows, batch)
        if self._frozen and "pixel_values" in batch and not isinstance(next(self._model.parameters()), DTensor):
            self._replace_pixels(rows, batch)
        # Copies do not keep the tensor of the whole mini-batch alive of which they are parts.
        return [recursively_apply(torch.clone, row) for row in rows]

    def _add_positions(self, rows: list[Row], batch: Features) -> None:
        base = backbone_of(self._model)
        if not hasattr(base, "get_rope_index") or "mm_token_type_ids" not in batch:
            return
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        found = base.get_rope_index(**{name: batch[name] for name in names if name in batch})[0]
        for number, row in enumerate(rows):
            row[ROTARY_POSITIONS] = found[:, number, batch["attention_mask"][number].bool()][None]

    def _replace_pixels(self, rows: list[Row], batch: Features) -> None:
        layers = compute_visual_tokens(self._model, send_to_device(batch, self._model.device), self._dtype)
        with_image = [row for row in rows if "pixel_values" in row]
        for row, tokens in zip(with_image, zip(*layers)):
            del row["pixel_values"]
            row[VISUAL_TOKENS] = [layer.cpu() for layer in tokens]

    def _merged(self, rows: Sequence[Row]) -> Features:
        """Put items together as ``preprocess`` does: padded to the longest, images one after the other."""
        by_name: dict[str, list[Any]] = defaultdict(list)
        for row in rows:
            for name, value in row.items():
                by_name[name].append(value)
        merged: Features = {}
        for name, values in by_name.items():
            if name in _BY_TOKEN or name == ROTARY_POSITIONS:
                merged[name] = self._padded(name, values)
            elif name == VISUAL_TOKENS:
                merged[name] = [torch.cat(layer) for layer in zip(*values)]
            elif name in _IMAGE_COUNTS:
                none = torch.zeros_like(values[0])
                merged[name] = torch.cat([row.get(name, none) for row in rows])
            else:
                merged[name] = torch.cat(values) if name in _BY_IMAGE else values[0]
        return merged

    def _padded(self, name: str, values: list[torch.Tensor]) -> torch.Tensor:
        tokenizer = self._model.tokenizer
        fill = tokenizer.pad_token_id if name == "input_ids" else int(name == ROTARY_POSITIONS)
        tokens_first = [value[0].movedim(-1, 0) for value in values]
        return pad_sequence(tokens_first, True, fill, tokenizer.padding_side).movedim(1, -1)
