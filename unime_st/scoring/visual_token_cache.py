"""Visual tokens of images, each computed once by the vision tower and kept within a memory bound."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from sentence_transformers.base.modules import Transformer

from unime_st.backbones.visual_outputs import GRID, run_tower
from unime_st.data import BadImageError, ImageRef
from unime_st.data.images import padded_to_aspect
from unime_st.scoring.chat_tokenizer import ChatTokenizer
from unime_st.scoring.prefix import ImageFeatures

_PIXELS_AT_ONCE = 8_000_000  # decoded, whatever the processor leaves of them
# Fewer on a CPU would save the tower 15 %, but while no large block was freed, glibc returns every other one to the system
# at once, and the language model, which often runs alone because images recur, takes a third longer.
_PATCHES_AT_ONCE = 1 << 14


class ImageKey(NamedTuple):
    """What the visual tokens of an image depend on.

    Args:
        image: The image.
        version: Size, time and inode of its file, so that a replaced file is another image; None for bytes.
        images_in_prompt: Number of images of its prompt where that matters (LLaVA-OneVision), else 1.
    """

    image: ImageRef
    version: tuple[int, ...] | None
    images_in_prompt: int


class VisualTokenCache:
    """Computes the visual tokens of images and keeps them, up to ``cache_bytes``, until the weights change.

    A TypeError tells of a model that cannot be given visual tokens that were computed before.
    """

    def __init__(self, transformer: Transformer, tokenizer: ChatTokenizer, cache_bytes: int) -> None:
        self.model: Any = transformer.model.base_model
        if not hasattr(self.model, "get_image_features"):
            raise TypeError(f"{type(transformer.model).__name__} has no vision tower that can be run by itself")
        self.tokenizer = tokenizer
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[ImageKey, ImageFeatures] = OrderedDict()
        self._held = 0
        self._weights_version = -1
        # Between such tokens a tokenizer sees no context, so a prompt may be put together from its parts.
        added = set(tokenizer.tokenizer.added_tokens_decoder)
        if tokenizer.image_ids[0] not in added or tokenizer.image_ids[-1] not in added:
            raise TypeError("its processor surrounds images with text, which belongs to the text next to it")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cache": OrderedDict(), "_held": 0}

    def clear(self) -> None:
        """Forget all images."""
        self._cache.clear()
        self._held = 0

    def keys(self, images: Sequence[ImageRef]) -> list[ImageKey]:
        """Keys of the images of one prompt, in its order."""
        together = len(images) if self.tokenizer.counts_images else 1
        return [ImageKey(image, _file_version(image), together) for image in images]

    def encode_images(self, keys: Iterable[ImageKey]) -> dict[ImageKey, ImageFeatures | BadImageError]:
        """Visual tokens of images, computed unless cached, or the reason why an image cannot be read."""
        self._clear_if_trained()
        found: dict[ImageKey, ImageFeatures | BadImageError] = {}
        missing: list[tuple[ImageKey, Image.Image]] = []
        pixels = 0
        for key in dict.fromkeys(keys):
            if key in self._cache:
                self._cache.move_to_end(key)
                found[key] = self._cache[key]
                continue
            try:
                missing.append((key, padded_to_aspect(key.image.open())))
            except BadImageError as error:
                found[key] = error
                continue
            pixels += missing[-1][1].width * missing[-1][1].height
            if pixels > _PIXELS_AT_ONCE:
                found |= self._compute(missing)
                missing, pixels = [], 0
        return found | self._compute(missing)

    def _clear_if_trained(self) -> None:
        # Every optimizer step and every load of weights raises the version of the tensors it writes.
        version = sum(parameter._version for parameter in self.model.parameters())
        if version != self._weights_version:
            self.clear()
        self._weights_version = version

    def _compute(self, missing: list[tuple[ImageKey, Image.Image]]) -> dict[ImageKey, ImageFeatures]:
        if not missing:
            return {}
        if self.tokenizer.independent_images:
            made = self._encode_together([image for _, image in missing])
        else:
            made = [self._encode_alone(image, key.images_in_prompt) for key, image in missing]
        found = {key: features for (key, _), features in zip(missing, made, strict=True)}
        self._cache.update(found)
        self._held += sum(features.nbytes for features in made)
        while self._held > self.cache_bytes and len(self._cache) > 1:
            self._held -= self._cache.popitem(last=False)[1].nbytes
        return found

    def _encode_together(self, images: list[Image.Image]) -> list[ImageFeatures]:
        rows, tensors = self.tokenizer.process_images(images)
        found, *inner = self._run_tower(tensors)
        return [
            ImageFeatures(row, found[number], tuple(layer[number] for layer in inner), tuple(grid))
            for number, (row, grid) in enumerate(zip(rows, tensors[GRID].tolist(), strict=True))
        ]

    def _encode_alone(self, image: Image.Image, images_in_prompt: int) -> ImageFeatures:
        rows, tensors = self.tokenizer.process_images([image] * images_in_prompt, per_prompt=images_in_prompt)
        found, *inner = self._run_tower(tensors)
        if inner or GRID in tensors:
            raise TypeError("images of this processor are not joined by concatenation")
        flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in found])
        row = rows[0][: len(rows[0]) // images_in_prompt]
        return ImageFeatures(row, flat[: len(flat) // images_in_prompt])

    @torch.inference_mode()
    def _run_tower(self, tensors: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        """Visual tokens of each image, in each layer that takes them."""
        moved = {name: tensor.to(self.model.device) for name, tensor in tensors.items()}
        return run_tower(self.model, moved, at_once=_PATCHES_AT_ONCE)


def _file_version(image: ImageRef) -> tuple[int, ...] | None:
    if image.path is None:
        return None
    try:
        found = os.stat(image.path)
    except OSError:  # reported when it is opened
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
