"""Frozen vision tower in a training step: runs once, where gradient caching would run it in both passes."""

from __future__ import annotations

import torch
from sentence_transformers.base.model import BaseModel

from unime_st.encoding.model_inputs import Features
from unime_st.training.spill import SpillFile
from unime_st.training.visual_tokens import (
    VISUAL_TOKENS,
    autocast,
    check_frozen,
    compute_visual_tokens,
    inject_visual_tokens,
    tensors_of,
    with_video_tokens,
)


class FrozenTowerCache:
    """Visual tokens of one training step with gradient caching, for its second pass over the mini-batches.

    A frozen vision tower then runs once a step, and every image and video is decoded once; a ValueError tells of one that
    is not frozen, see :func:`~unime_st.training.visual_tokens.check_frozen`.

    Attributes:
        max_bytes: Memory for the features kept for the second pass: 4 MiB on a CPU, 1 GiB on another device. The
            others go to a temporary file, so that memory does not grow with the batch.

    Example:
        >>> import torch
        >>> from unime_st import UniME
        >>> cache = FrozenTowerCache(UniME("unime-tiny").requires_grad_(False), torch.float32)
        >>> cache.max_bytes >> 20
        4
    """

    def __init__(self, model: BaseModel, dtype: torch.dtype) -> None:
        check_frozen(model)
        self.max_bytes = (4 if model.device.type == "cpu" else 1024) << 20
        self._model, self._dtype = model, dtype
        self._kept: dict[int, Features] = {}
        self._held = 0
        self._spill = SpillFile()
        model.register_forward_pre_hook(inject_visual_tokens)

    def begin(self) -> None:
        """Start a step: drop the features of the last one."""
        self._kept.clear()
        self._held = 0
        self._spill.clear()

    @property
    def host_bytes(self) -> int:
        """Bytes of kept features in the memory of the host."""
        return self._held if self._model.device.type == "cpu" else 0

    def __contains__(self, number: int) -> bool:
        return number in self._kept or number in self._spill

    def __getitem__(self, number: int) -> Features:
        """Features of mini-batch ``number`` as :meth:`encode_images` kept them."""
        if number in self._kept:
            return dict(self._kept[number])
        return self._spill.read(number, self._model.device)

    def encode_images(self, number: int, features: Features, *, keep: bool) -> Features:
        """Replace the pixels of a mini-batch, frames of videos included, by visual tokens.

        The result is kept for the second pass if asked to.
        """
        if "pixel_values" in features:
            tokens = list(map(torch.cat, compute_visual_tokens(self._model, features, self._dtype)))
            features = {name: value for name, value in features.items() if name != "pixel_values"}
            features[VISUAL_TOKENS] = tokens
        with autocast(self._model, self._dtype):
            features = with_video_tokens(self._model, features)
        if keep:
            self._keep(number, features)
        return features

    def _keep(self, number: int, features: Features) -> None:
        size = sum(tensor.nbytes for tensor in tensors_of(features))
        if self._held + size <= self.max_bytes:
            self._held += size
            self._kept[number] = dict(features)
        else:
            self._spill.add(number, features)
