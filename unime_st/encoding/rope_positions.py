"""Rotary position ids of multimodal inputs, computed once per layout and before the forward pass.

The Qwen families give image tokens the row and column of their patch as positions (M-RoPE). Their forward pass computes
these in a Python loop over rows, with several small kernels and waits for the device per image. Here the threads that
preprocess the batches do it on the CPU, and inputs of the same layout share the result.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn

from unime_st.encoding.model_inputs import Features

_KEPT = 512
"""Number of layouts to remember."""

_ARGUMENTS = ("mm_token_type_ids", "attention_mask", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")


class RopePositions:
    """Adds ``position_ids`` to the features of batches with images or videos, if the model has multimodal positions.

    Example:
        >>> from PIL import Image
        >>> from unime_st import UniME
        >>> model = UniME("unime-tiny")
        >>> features = RopePositions(model[0]).add(model.preprocess([Image.new("RGB", (56, 56))]))
        >>> features["position_ids"].shape == (3, *features["input_ids"].shape)
        True
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._backbone: Any = transformer.model if isinstance(transformer, Transformer) else None
        self._layouts: OrderedDict[tuple[bytes, bytes], Tensor] = OrderedDict()

    def add(self, features: Features) -> Features:
        """Features with position ids of shape (3, batch, length); unchanged if the model computes them cheaply."""
        visual = "image_grid_thw" in features or "video_grid_thw" in features
        if not visual or not hasattr(self._backbone, "get_rope_index") or "mm_token_type_ids" not in features:
            return features
        counts = features.get("num_images_per_sample")
        if "video_grid_thw" in features or counts is None:
            given = {name: features[name] for name in _ARGUMENTS if name in features}
            positions = self._backbone.get_rope_index(features["input_ids"], **given)[0]
        else:
            positions = self._of_images(features, [int(count) for count in counts])
        return {**features, "position_ids": positions}

    def _of_images(self, features: Features, counts: list[int]) -> Tensor:
        types, mask, grids = (
            features["mm_token_type_ids"],
            features["attention_mask"].bool(),
            features["image_grid_thw"],
        )
        positions = torch.zeros(3, *types.shape, dtype=features["input_ids"].dtype)
        ends = list(itertools.accumulate(counts))
        for row, (count, end) in enumerate(zip(counts, ends, strict=True)):
            kept = mask[row].nonzero().flatten()
            own = types[row, kept]
            visual = own.nonzero().flatten()
            head = int(visual[-1]) + 1 if len(visual) else 0
            before = self._layout(own[:head], grids[end - count : end]) if head else torch.zeros(3, 0).long()
            start = int(before.max()) + 1 if head else 0
            after = torch.arange(start, start + len(kept) - head).expand(3, -1)
            positions[:, row, kept] = torch.cat([before, after], dim=1)
        return positions.to(features["input_ids"].device)

    def _layout(self, types: Tensor, grids: Tensor) -> Tensor:
        """Positions of a row up to its last image token, shape (3, length)."""
        key = (types.numpy().tobytes(), grids.numpy().tobytes())
        found = self._layouts.get(key)
        if found is None:
            ids = torch.zeros_like(types, dtype=torch.long)[None]
            found = self._backbone.get_rope_index(ids, mm_token_type_ids=types[None], image_grid_thw=grids)[0][:, 0]
            self._layouts[key] = found
            while len(self._layouts) > _KEPT:
                self._layouts.popitem(last=False)
        return found
