"""Rotary position ids of multimodal inputs, computed once per layout and before the forward pass.

The Qwen families give image tokens the row and column of their patch as positions (M-RoPE). Their forward pass computes
these in a Python loop over rows, with several small kernels and waits for the device per image. Here the threads that
preprocess the batches do it on the CPU, and inputs of the same layout share the result.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
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
        self._layouts: OrderedDict[tuple[bytes, bytes], tuple[np.ndarray, int]] = OrderedDict()

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
        names = ("mm_token_type_ids", "attention_mask", "image_grid_thw")
        types, mask, grids = (features[name].cpu().numpy() for name in names)
        positions = np.zeros((3, *types.shape), dtype=np.int64)
        steps = np.arange(types.shape[1])
        starts, lengths = mask.argmax(1).tolist(), mask.sum(1).tolist()
        end_of_images = (types.shape[1] - types[:, ::-1].astype(bool).argmax(1)).tolist()
        image = 0
        for row, (start, length, count) in enumerate(zip(starts, lengths, counts, strict=True)):
            text, next_position = start, 0  # of the tokens behind the last image
            if count:
                text = end_of_images[row]
                layout, next_position = self._layout(types[row, start:text], grids[image : image + count])
                positions[:, row, start:text] = layout
                image += count
            positions[:, row, text : start + length] = steps[: start + length - text] + next_position
        return torch.from_numpy(positions).to(features["input_ids"].device)

    def _layout(self, types: np.ndarray, grids: np.ndarray) -> tuple[np.ndarray, int]:
        """Positions of a row up to its last image token, shape (3, length), and the position of the next token."""
        key = (types.tobytes(), grids.tobytes())
        found = self._layouts.get(key)
        if found is None:
            kinds, shapes = torch.from_numpy(types.copy())[None], torch.from_numpy(grids.copy())
            ids = torch.zeros_like(kinds, dtype=torch.long)
            positions = self._backbone.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=shapes)[0]
            layout = positions[:, 0].numpy()
            self._layouts[key] = found = layout, int(layout.max()) + 1
            while len(self._layouts) > _KEPT:
                self._layouts.popitem(last=False)
        return found
