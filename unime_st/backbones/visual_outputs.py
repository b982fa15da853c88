"""Input and output of a vision tower: its images in parts, what it returns, what a model takes instead of pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids

PIXELS, GRID = "pixel_values", "image_grid_thw"
"""Features with the processed images of a batch, and with the frames, rows and columns of patches of each image."""

_CPU_PATCHES, _DEVICE_PATCHES = 1024, 1 << 14
"""Patches that a tower takes at a time."""

_PLAIN_POSITIONS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
"""Families whose towers take the positions of patches as :func:`get_vision_position_ids` computes them."""


def backbone_of(model: nn.Module) -> Any:
    """Vision-language model of transformers, without its head, inside a model of Sentence Transformers.

    Returns:
        The model; None of a model of another kind.

    Example:
        >>> from unime_st import UniME
        >>> type(backbone_of(UniME("unime-tiny"))).__name__
        'Qwen2VLModel'
    """
    return getattr(getattr(model, "transformers_model", None), "base_model", None)


def takes_visual_tokens(base: Any) -> bool:
    """Whether a model takes the output of its vision tower, as ``mm_encoder_outputs``, instead of pixels.

    Args:
        base: Vision-language model of transformers without its head; None of a model of another kind.

    Example:
        >>> from unime_st import UniME
        >>> takes_visual_tokens(backbone_of(UniME("unime-tiny")))
        True
    """
    return base is not None and "mm_encoder_outputs" in signature(base.forward).parameters


def image_parts(patches: Tensor, grids: Tensor, at_once: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield patches and grids of whole images, as many at a time as a vision tower shall take.

    A tower looks at each image alone; the activations of fewer images take less memory and stay in the cache of a CPU.

    Args:
        patches: Patches of all images, ``(patches, values)``.
        grids: Frames, rows and columns of patches of each image, ``(images, 3)``.
        at_once: As for :func:`run_tower`.

    Example:
        >>> import torch
        >>> grids = torch.tensor([[1, 20, 30], [1, 30, 30], [1, 2, 2]])
        >>> [part.shape[0] for part, _ in image_parts(torch.zeros(1504, 3), grids)]
        [600, 904]
    """
    limit = at_once or (_CPU_PATCHES if patches.device.type == "cpu" else _DEVICE_PATCHES)
    ends = grids.prod(dim=1).cumsum(0).tolist()
    first = start = 0
    for index, end in enumerate(ends):
        if index + 1 == len(ends) or ends[index + 1] - start > limit:
            yield patches[start:end], grids[first : index + 1]
            first, start = index + 1, end


def run_tower(
    base: Any,
    features: Mapping[str, Any],
    values: Callable[[Tensor], Tensor] | None = None,
    at_once: int | None = None,
) -> list[list[Tensor]]:
    """Run the vision tower on the images of a batch, a few at a time where they have grids.

    Args:
        base: Vision-language model of transformers without its head.
        features: Features with :data:`PIXELS`, and what else the tower takes.
        values: Makes the values of some patches from what the features have. Defaults to None: they are the values.
        at_once: Patches that the tower takes at a time. Defaults to None: 1,024 on a CPU, 16,384 on another device.

    Returns:
        list[list[Tensor]]: For each layer of :func:`tower_layers` the tokens of each image, ``(tokens, hidden)``.

    Example:
        >>> from PIL import Image
        >>> from unime_st import UniME
        >>> model = UniME("unime-tiny").requires_grad_(False)
        >>> layers = run_tower(backbone_of(model), model.preprocess([Image.new("RGB", (56, 84))] * 2))
        >>> [tokens.shape for tokens in layers[0]]
        [torch.Size([12, 128]), torch.Size([12, 128])]
    """
    if GRID not in features:
        accepted = signature(base.get_image_features).parameters
        inputs = {name: value for name, value in features.items() if name in accepted}
        outputs = [base.get_image_features(**inputs, return_dict=True)]
    else:
        outputs = [
            base.get_image_features(
                values(patches) if values else patches, grids, return_dict=True, **_shared_positions(base, grids)
            )
            for patches, grids in image_parts(features[PIXELS], features[GRID], at_once)
        ]
    return [list(chain(*layers)) for layers in zip(*map(tower_layers, outputs), strict=True)]


def _shared_positions(base: Any, grids: Tensor) -> dict[str, Tensor]:
    """Row and column of each patch, computed once for images of one grid; the tower would do it image by image."""
    if base.config.model_type.removeprefix("unime_") not in _PLAIN_POSITIONS:
        return {}
    side, found = base.visual.spatial_merge_size, dict[tuple[int, ...], Tensor]()
    shapes = [tuple(grid) for grid in grids.tolist()]
    for shape, grid in zip(shapes, grids.split(1)):
        if shape not in found:
            found[shape] = get_vision_position_ids(grid, side)
    return {"image_position_ids": torch.cat([found[shape] for shape in shapes])}


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
