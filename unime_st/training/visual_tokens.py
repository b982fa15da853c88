"""Visual tokens: the output of a frozen vision tower, computed separately and passed to the model instead of pixels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from sentence_transformers.base.model import BaseModel
from torch import nn

from unime_st.backbones.video_tokens import VIDEO_PIXELS, compute_video_tokens, video_output
from unime_st.backbones.visual_outputs import backbone_of, image_output, run_tower
from unime_st.encoding.model_inputs import Features

VISUAL_TOKENS = "visual_tokens"
"""Feature with the visual tokens of a mini-batch: those of the input layer, then those that enter inner layers."""
VIDEO_TOKENS = "video_tokens"
"""The same for its videos."""
ROTARY_POSITIONS = "rotary_positions"
"""Feature with the position ids of multimodal rotary embeddings, ``(rows, 3, tokens)``: rows first, to be split."""

_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next", "llava_onevision")


def check_frozen(model: BaseModel) -> None:
    """Check that the visual tokens of a model, with its adapter, are the same in every step.

    Raises:
        ValueError: If the family is not supported, or a part outside the language model is trained or has dropout.
    """
    base = backbone_of(model)
    family = base.config.model_type.removeprefix("unime_")
    if family not in _FAMILIES:
        raise ValueError(f"vision_cache supports {', '.join(_FAMILIES)}, but the model is {family}: leave it out.")
    language = f"{name_of(base, base.get_decoder())}."
    trained = [
        name
        for name, parameter in base.named_parameters()
        if parameter.requires_grad and not name.startswith(language)
    ]
    if trained:
        raise ValueError(
            f"vision_cache needs a frozen vision tower and projector, but {len(trained)} of their weights are trained "
            f"({trained[0]}, ...): leave vision_cache out, or change lora_targets (with lora_rank 0: frozen)."
        )
    for name, module in base.named_modules():
        rates = (getattr(module, rate, 0.0) for rate in ("p", "dropout", "attention_dropout", "drop_prob"))
        if not name.startswith(language) and any(isinstance(rate, float) and rate > 0 for rate in rates):
            raise ValueError(f"vision_cache needs a vision tower without dropout, but {name} has some: leave it out.")


def is_frozen(model: BaseModel) -> bool:
    """Whether :func:`check_frozen` finds nothing."""
    try:
        check_frozen(model)
    except ValueError:  # a vision tower that is trained, or of another kind
        return False
    return True


def compute_visual_tokens(model: BaseModel, features: Features, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Run the vision tower and the projector without gradients, under autocast to ``dtype`` as in training.

    Returns:
        For the input layer, and for each inner layer that visual tokens enter, the tokens of each image,
        ``(tokens, hidden)``.
    """
    with torch.no_grad(), autocast(model, dtype):
        return run_tower(backbone_of(model), features)


def inject_visual_tokens(module: nn.Module, args: tuple[Features, ...]) -> tuple[Features, ...] | None:
    """Forward pre-hook of a model: hand visual tokens and positions on under transformers' names for them.

    The frames of videos beside stored visual tokens of images pass the vision tower here, because a model takes either
    pixels or visual tokens.
    """
    if not args[0].keys() & {VISUAL_TOKENS, VIDEO_TOKENS, ROTARY_POSITIONS}:
        return None
    features = dict(args[0])
    if ROTARY_POSITIONS in features:
        features["position_ids"] = features.pop(ROTARY_POSITIONS).transpose(0, 1)
    if not features.keys() & {VISUAL_TOKENS, VIDEO_TOKENS}:
        return features, *args[1:]
    features = with_video_tokens(module, features)  # type: ignore[arg-type]
    outputs: dict[str, object] = {}
    if VISUAL_TOKENS in features:
        outputs["image"] = image_output(features.pop(VISUAL_TOKENS))
    if VIDEO_TOKENS in features:
        outputs["video"] = video_output(backbone_of(module), features.pop(VIDEO_TOKENS))  # type: ignore[arg-type]
    return {**features, "mm_encoder_outputs": outputs}, *args[1:]


def with_video_tokens(model: BaseModel, features: Features) -> Features:
    """Features whose frames of videos, if there are any, are replaced by :data:`VIDEO_TOKENS`."""
    if VIDEO_PIXELS not in features:
        return features
    with torch.no_grad():
        tokens = compute_video_tokens(backbone_of(model), features)
    kept = {name: value for name, value in features.items() if name != VIDEO_PIXELS}
    return {**kept, VIDEO_TOKENS: tokens}


def tensors_of(features: Features) -> list[torch.Tensor]:
    """Tensors of features, those inside lists included."""
    parts = [part for value in features.values() for part in (value if isinstance(value, list) else [value])]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def autocast(model: BaseModel, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast context of the training; none where it computes in float32."""
    return torch.autocast(model.device.type, dtype) if dtype != torch.float32 else nullcontext()


def name_of(module: nn.Module, part: nn.Module) -> str:
    """Name of a submodule in its module."""
    return next(name for name, child in module.named_modules() if child is part)
