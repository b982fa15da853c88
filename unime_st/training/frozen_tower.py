"""Frozen vision tower of a training step: run once where gradient caching would run it in both passes."""

from __future__ import annotations

import torch
from sentence_transformers.base.model import BaseModel

from unime_st.training.feed import Features
from unime_st.training.spill import Spill
from unime_st.training.visual_tokens import VISUAL_TOKENS, autocast, check_frozen, inject_visual_tokens, visual_layers


class FrozenTowerCache:
    """Runs a frozen vision tower once in a step with cached gradients, whose two passes would each decode and run it.

    Args:
        model: The model to train, with its adapter.
        dtype: What training computes in.

    Attributes:
        most_bytes: Features that may be kept in memory from the first pass to the second: 16 MiB in that of a CPU, 1 GiB
            in that of another device. The others wait in a temporary file, so that memory does not grow with the batch.

    Raises:
        ValueError: See :func:`check_frozen`.

    Example:
        >>> import torch
        >>> from unime_st import UniME
        >>> once = FrozenTowerCache(UniME("unime-tiny").requires_grad_(False), torch.float32)
        >>> once.most_bytes >> 20
        16
    """

    def __init__(self, model: BaseModel, dtype: torch.dtype) -> None:
        check_frozen(model)
        self.most_bytes = (16 if model.device.type == "cpu" else 1024) << 20
        self._model, self._dtype = model, dtype
        self._kept: dict[int, Features] = {}
        self._held = 0
        self._spill = Spill()
        model.register_forward_pre_hook(inject_visual_tokens)

    def begin(self) -> None:
        """Forget the step before."""
        self._kept.clear()
        self._held = 0
        self._spill.clear()

    @property
    def host_bytes(self) -> int:
        """Bytes kept in the memory of the host."""
        return self._held if self._model.device.type == "cpu" else 0

    def __contains__(self, number: int) -> bool:
        return number in self._kept or number in self._spill

    def __getitem__(self, number: int) -> Features:
        """The features of mini-batch ``number`` as the first pass left them."""
        if number in self._kept:
            return dict(self._kept[number])
        return self._spill.read(number, self._model.device)

    def encode_images(self, number: int, features: Features, *, keep: bool) -> Features:
        """Put visual tokens in the place of pixels.

        Args:
            number: Of the mini-batch.
            features: Input of the model.
            keep: For the second pass.

        Returns:
            dict: Input of the model without pixels.
        """
        tokens: list[torch.Tensor] = []
        if "pixel_values" in features:
            with torch.no_grad(), autocast(self._model, self._dtype):
                layers = visual_layers(self._model, features)
            tokens = [torch.cat([layer[index] for index in range(len(layer))]) for layer in layers]
            features = {name: value for name, value in features.items() if name != "pixel_values"}
            features[VISUAL_TOKENS] = tokens
        if keep:
            self._keep(number, features)
        return features

    def _keep(self, number: int, features: Features) -> None:
        parts = [part for value in features.values() for part in (value if isinstance(value, list) else [value])]
        size = sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
        if self._held + size <= self.most_bytes:
            self._held += size
            self._kept[number] = dict(features)
        else:
            self._spill.add(number, features)
