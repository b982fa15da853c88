"""Images as bytes until the vision tower, which takes a few of them at a time.

The float values of a batch of images are its largest tensor, four times as large as their bytes, and the activations of
the vision tower come next. The tower looks at each image alone, so neither need exist for the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.distributed.tensor import DTensor

from unime_st.backbones.visual_outputs import PIXELS, backbone_of, image_output, run_tower, takes_visual_tokens
from unime_st.encoding.model_inputs import Features

PIXEL_TABLE = "pixel_table"
"""Feature beside bytes as ``pixel_values``: the normalized value of each byte in each channel."""

_LOOKED_UP = 512
"""Patches whose values are looked up at a time: their indices are as large as their values."""


def pixel_table(image_processor: Any) -> Tensor | None:
    """Read from an image processor of Qwen's kind what it makes of each value of each channel.

    Returns:
        Tensor | None: Values of shape (3, 256), or None if the processor cannot leave pixels as they are.

    Example:
        >>> from unime_st import UniME
        >>> pixel_table(UniME("unime-tiny").processor.image_processor).shape
        torch.Size([3, 256])
    """
    side = image_processor.patch_size * image_processor.merge_size * 2
    pixels = np.broadcast_to(np.resize(np.arange(256, dtype=np.uint8), (side, side, 1)), (side, side, 3))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    stored = process_as_bytes(image_processor, [image], do_resize=False)[PIXELS]
    made = image_processor([image], return_tensors="pt", do_resize=False)[PIXELS]
    if stored.dtype != torch.uint8 or stored.shape != made.shape:
        return None
    table = torch.full((3, 256), torch.nan)
    for row, given, found in zip(table, stored.chunk(3, dim=1), made.chunk(3, dim=1)):
        row[given.flatten().long()] = found.flatten()
    return None if table.isnan().any() else table


def process_as_bytes(image_processor: Any, images: Sequence[Image.Image], **options: Any) -> Any:
    """Process images without normalization; ``pixel_values`` are bytes where the processor leaves whole values."""
    processed = image_processor(images, return_tensors="pt", do_rescale=False, do_normalize=False, **options)
    pixels = processed[PIXELS]
    stored = pixels.to(torch.uint8)
    if torch.equal(stored, pixels):
        processed[PIXELS] = stored
    return processed


def values_of(patches: Tensor, table: Tensor) -> Tensor:
    """Normalized values of patches of shape (patches, channels * pixels of a channel), given as bytes.

    Example:
        >>> import torch
        >>> values_of(torch.full((1, 3), 255, dtype=torch.uint8), torch.arange(256.0).expand(3, 256) / 255)
        tensor([[1., 1., 1.]])
    """
    channels, size = len(table), patches.shape[1]
    starts = torch.arange(channels, dtype=torch.int32, device=table.device) * table.shape[1]
    starts, flat = starts.repeat_interleave(size // channels), table.flatten()
    values = table.new_empty(patches.shape)
    for given, found in zip(patches.split(_LOOKED_UP), values.split(_LOOKED_UP)):
        torch.index_select(flat, 0, (given + starts).flatten(), out=found.view(-1))
    return values


def takes_bytes(model: SentenceTransformer) -> bool:
    """Whether :func:`with_visual_tokens` can run the vision tower of a model.

    The weights of a sharded model are complete within its own forward pass only.
    """
    base = backbone_of(model)
    return takes_visual_tokens(base) and not isinstance(next(base.parameters()), DTensor)


def with_visual_tokens(model: SentenceTransformer, features: Features) -> Features:
    """Replace the bytes of images by their visual tokens; other features stay as they are.

    Args:
        model: The embedding model.
        features: Features on the device of the model, with bytes as ``pixel_values`` and their ``pixel_table``.
    """
    if PIXEL_TABLE not in features:
        return features
    layers = run_tower(backbone_of(model), features, partial(values_of, table=features[PIXEL_TABLE]))
    kept = {name: value for name, value in features.items() if name not in (PIXELS, PIXEL_TABLE)}
    return {**kept, "mm_encoder_outputs": {"image": image_output(list(map(torch.cat, layers)))}}
