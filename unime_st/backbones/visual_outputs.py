"""Output of a vision tower: what a tower returns, and what a model takes instead of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from types import SimpleNamespace
from typing import Any

from torch import Tensor

PIXELS, GRID = "pixel_values", "image_grid_thw"
"""Features with the processed images of a batch, and with the frames, rows and columns of patches of each image."""


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
