"""Input and output of a vision tower: its images in parts, what it returns, what a model takes instead of pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids

PIXELS, GRID = "pixel_values", "image_grid_thw"
"""Features with the processed images of a batch, and with the frames, rows and columns of patches of each image."""

_CPU_PATCHES, _DEVICE_PATCHES = 1024, 1 << 14
"""Patches that a tower takes at a time."""


def takes_visual_tokens(base: Any) -> bool:
    """Whether a model takes the output of its vision tower, as ``mm_encoder_outputs``, instead of pixels.

    Args:
        base: Vision-language model of transformers without its head; None of a model of another kind.

    Example:
        >>> from unime_st import UniME
        >>> takes_visual_tokens(UniME("unime-tiny").transformers_model.base_model)
        True
    """
    return base is not None and "mm_encoder_outputs" in signature(base.forward).parameters


def image_parts(patches: Tensor, grids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield patches and grids of whole images, as many at a time as a vision tower shall take.

    A tower looks at each image alone; the activations of fewer images take less memory and stay in the cache of a CPU.

    Args:
        patches: Patches of all images, ``(patches, values)``.
        grids: Frames, rows and columns of patches of each image, ``(images, 3)``.

    Example:
        >>> import torch
        >>> grids = torch.tensor([[1, 20, 30], [1, 30, 30], [1, 2, 2]])
        >>> [part.shape[0] for part, _ in image_parts(torch.zeros(1504, 3), grids)]
        [600, 904]
    """
    limit = _CPU_PATCHES if patches.device.type == "cpu" else _DEVICE_PATCHES
    ends = grids.prod(dim=1).cumsum(0).tolist()
    first = start = 0
    for index, end in enumerate(ends):
        if index + 1 == len(ends) or ends[index + 1] - start > limit:
            yield patches[start:end], grids[first : index + 1]
            first, start = index + 1, end


def patch_positions(base: Any, grids: Tensor) -> Tensor:
    """Row and column of each patch, ``(patches, 2)``, as the tower would compute them image by image.

    Args:
        base: Vision-language model of a family with grids.
        grids: Frames, rows and columns of patches of each image, ``(images, 3)``. Images of one grid share the work.

    Example:
        >>> import torch
        >>> from unime_st import UniME
        >>> base = UniME("unime-tiny").transformers_model.base_model
        >>> patch_positions(base, torch.tensor([[1, 2, 2]])).tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    shapes = [tuple(grid) for grid in grids.tolist()]
    merged, found = base.visual.spatial_merge_size, dict[tuple[int, ...], Tensor]()
    for shape, grid in zip(shapes, grids.split(1)):
        if shape not in found:
            found[shape] = get_vision_position_ids(grid, merged)
    return torch.cat([found[shape] for shape in shapes])


def run_tower(base: Any, patches: Tensor, grids: Tensor) -> Any:
    """Output of ``get_image_features`` of a model of a family with grids."""
    return base.get_image_features(patches, grids, image_position_ids=patch_positions(base, grids), return_dict=True)


def tower_layers(output: Any) -> list[Sequence[Tensor]]:
    """Visual tokens for the input layer, and for each inner layer that they enter (Qwen3-VL).

    Args:
        output: What ``get_image_features`` or ``get_video_features`` of a model returns.

    Returns:
        list[Sequence[Tensor]]: For each layer the tokens of each image, ``(tokens, hidden)``.
    """
    return [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]


def image_output(layers: Sequence[Tensor]) -> SimpleNamespace:
    """Output of the vision tower, as ``mm_encoder_outputs["image"]`` of a model takes it.

    Args:
        layers: For each layer of :func:`tower_layers` the tokens of all images one after another.

    Example:
        >>> import torch
        >>> image_output([torch.ones(4, 8)]).pooler_output[0].shape
        torch.Size([4, 8])
    """
    tokens, *inner = layers
    return SimpleNamespace(pooler_output=(tokens,), deepstack_features=[(layer,) for layer in inner])
