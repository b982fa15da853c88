"""Visual tokens of videos: computed by the vision tower alone, and given to the language model instead of frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from unime_st.backbones.visual_outputs import image_output, tower_layers

VIDEO_PIXELS = "pixel_values_videos"
"""Feature with the processed frames of a batch."""

VIDEO_GRID = "video_grid_thw"
"""Feature with the pairs of frames, rows and columns of patches of each video; LLaVA-OneVision has none."""


def compute_video_tokens(base: Any, features: Mapping[str, Any]) -> list[torch.Tensor]:
    """Run the vision tower on the videos of a batch.

    Args:
        base: Vision-language model of transformers without its head.
        features: Features with :data:`VIDEO_PIXELS`.

    Returns:
        For the input layer, and for each inner layer that visual tokens enter (Qwen3-VL), the tokens of all videos one
        after another: ``(tokens, hidden)``.
    """
    grid = {VIDEO_GRID: features[VIDEO_GRID]} if VIDEO_GRID in features else {}
    output = base.get_video_features(features[VIDEO_PIXELS], **grid, return_dict=True)
    return [torch.cat(list(layer)) for layer in tower_layers(output)]


def video_output(base: Any, layers: Sequence[torch.Tensor]) -> SimpleNamespace:
    """Output of the vision tower, as ``mm_encoder_outputs["video"]`` of a model takes it.

    Args:
        base: Vision-language model of transformers without its head.
        layers: Visual tokens as :func:`compute_video_tokens` returns them.
    """
    output = image_output(layers)
    if base.config.model_type.removeprefix("unime_") == "llava_onevision":
        output.pooler_output = layers[0][None]
    return output
