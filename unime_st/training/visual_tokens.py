"""Visual tokens: what a vision tower hands to the language model, computed alone and put in the place of pixels."""

from __future__ import annotations

from contextlib import nullcontext
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from sentence_transformers.base.model import BaseModel
from torch import nn

from unime_st.training.feed import Features

VISUAL_TOKENS = "visual_tokens"
"""Feature with the stored tokens of a mini-batch: those that enter the language model, then those of inner layers."""

_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next", "llava_onevision")


def check_frozen(model: BaseModel) -> None:
    """Refuse a model whose visual tokens do not stay what they are.

    Raises:
        ValueError: If the family is not supported, or something outside the language model is trained or random.

    Example:
        >>> from unime_st import UniME
        >>> check_frozen(UniME("unime-tiny").requires_grad_(False))
    """
    base: Any = base_model(model)
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


def inject_visual_tokens(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Hand stored tokens to the model under the name that transformers has for them."""
    if VISUAL_TOKENS not in args[0]:
        return None
    features = dict(args[0])
    tokens, *inner = features.pop(VISUAL_TOKENS)
    image = SimpleNamespace(pooler_output=(tokens,), deepstack_features=[(layer,) for layer in inner])
    return {**features, "mm_encoder_outputs": {"image": image}}, *args[1:]


def visual_layers(model: BaseModel, features: Features) -> list[Any]:
    """What the vision tower gives to the language model, for each layer that it enters a sequence over the images."""
    base = base_model(model)
    accepted = signature(base.get_image_features).parameters
    inputs = {name: value for name, value in features.items() if name in accepted}
    out = base.get_image_features(**inputs, return_dict=True)
    return [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]


def autocast(model: BaseModel, dtype: torch.dtype) -> Any:
    return torch.autocast(model.device.type, dtype) if dtype != torch.float32 else nullcontext()


def base_model(model: BaseModel) -> Any:
    transformer: Any = model.transformers_model
    return transformer.base_model


def name_of(module: nn.Module, part: nn.Module) -> str:
    return next(name for name, child in module.named_modules() if child is part)
