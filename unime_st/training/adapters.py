"""Trainable weights: a LoRA or DoRA adapter over frozen weights, quantized or not, or the weights themselves."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from sentence_transformers.base.model import BaseModel
from transformers import BitsAndBytesConfig

from unime_st.compat import forget_adapter
from unime_st.training.arguments import StageArguments
from unime_st.training.lora_linear import merge_lora_products

ADAPTER = "default"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def computation_dtype(args: StageArguments) -> torch.dtype:
    """The dtype that autocast computes in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def load_options(args: StageArguments) -> dict[str, Any]:
    """Keyword arguments with which the model to train is loaded: its dtype, and whether it is quantized.

    Under an adapter the frozen weights may be as short as the computation is. Weights that are trained stay in
    float32: in bfloat16 most updates are smaller than half the distance to the next number and would be lost.
    """
    dtype = _DTYPES.get(args.weights) or (computation_dtype(args) if args.lora_rank else torch.float32)
    model_options: dict[str, object] = {"dtype": dtype}
    if args.quantize:
        model_options["quantization_config"] = _quantization(args)
    return {"model_kwargs": model_options, **({"device": "cpu"} if args.use_cpu else {})}


def _quantization(args: StageArguments) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("quantize needs bitsandbytes: pip install 'unime-st[qlora]'.")
    if args.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # The tower and the projector are a small part of the weights, and images suffer most from rounding them.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computation_dtype(args),
        llm_int8_skip_modules=["visual", "vision_tower", "vision_model", "multi_modal_projector", "lm_head"],
    )


def choose_trainable(model: BaseModel, args: StageArguments) -> None:
    """Add the adapter, or freeze what ``frozen`` names.

    Raises:
        ValueError: If ``lora_targets`` matches no layer or ``frozen`` no weight, or nothing is left to train.
    """
    if args.lora_rank:
        add_lora(model, args)
    elif args.frozen:
        named = [weight for name, weight in model.named_parameters() if re.search(args.frozen, name)]
        if not named:
            raise ValueError(f"`frozen` ({args.frozen!r}) names no weight of this model: all would be trained.")
        for weight in named:
            weight.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"nothing is left to train: `frozen` ({args.frozen!r}) names all weights.")


def add_lora(model: BaseModel, args: StageArguments) -> None:
    """Give ``model`` a trainable LoRA or DoRA adapter; its weights are float32 whatever the model's are."""
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_targets,
        use_dora=args.use_dora,
        task_type=TaskType.FEATURE_EXTRACTION,
    )
    model.add_adapter(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    merge_lora_products(model)


def merge_lora(model: BaseModel) -> None:
    """Fold the adapter into the weights, so that the saved folder is a plain full model."""
    transformer: Any = model.transformers_model
    for module in list(transformer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge()
                setattr(module, name, child.get_base_layer())
    forget_adapter(transformer)


def load_adapter_weights(model: BaseModel, checkpoint: str | Path) -> bool:
    """Load the adapter that a checkpoint may hold into that of a model; the weights under it stay as they are."""
    path = Path(checkpoint) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return False
    transformer: Any = model.transformers_model
    weights = {name.removeprefix("base_model.model."): weight for name, weight in load_file(path).items()}
    expected = get_peft_model_state_dict(transformer, adapter_name=ADAPTER).keys()
    if wrong := sorted(expected ^ weights.keys()):
        raise RuntimeError(
            f"{path} does not fit the adapter of the model: {', '.join(wrong[:3])} ({len(wrong)} weights)."
        )
    set_peft_model_state_dict(transformer, weights, adapter_name=ADAPTER)
    return True


def trained_into(fresh: BaseModel, weights: dict[str, torch.Tensor], args: StageArguments) -> BaseModel:
    """Put what was trained over quantized or sharded weights into a fresh, unquantized model, in place.

    ``weights`` are the adapter or all weights.
    """
    if args.lora_rank:
        add_lora(fresh, args)
    expected = {name for name, weight in fresh.named_parameters() if weight.requires_grad}
    if missing := sorted(expected - weights.keys()):
        raise RuntimeError(
            f"trained state dict is missing {', '.join(missing[:3])} ({len(missing)} of {len(expected)} weights)"
        )
    fresh.load_state_dict({name: weights[name] for name in expected}, strict=False)
    if args.lora_rank:
        merge_lora(fresh)
    return fresh
