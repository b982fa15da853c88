"""Merging a LoRA or DoRA adapter into its base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForMultimodalLM, PreTrainedConfig

from unime_st.checkpoints.source import CheckpointError, Source
from unime_st.recipes import Recipe

_ADAPTER_PART = re.compile(r"\.(lora_|modules_to_save)")


def write_merged(part: Path, source: Source, full: Source, config: PreTrainedConfig, recipe: Recipe) -> str:
    """Merge an adapter into its base and save the weights.

    peft does the arithmetic, so all its variants are merged right. Only names are translated: released adapters were
    trained on models whose modules had other names in older versions of transformers.

    Args:
        part: Folder to save in; holds the configuration already.
        source: The adapter.
        full: The base.
        config: Configuration that the merged model loads with.
        recipe: Says whether the language head is needed.

    Returns:
        ``"merged"``, for the record.

    Raises:
        CheckpointError: The adapter does not belong to the base, or replaces whole modules.

    Example:
        >>> write_merged(part, read_source("adapter"), read_source("base"), config, recipe)   # doctest: +SKIP
        'merged'
    """
    auto = AutoModelForMultimodalLM if recipe.task == "reranker" else AutoModel
    model = auto.from_pretrained(full.folder, config=config)
    state = {name: tensor for path in source.weights for name, tensor in load_file(path).items()}
    named, state = _translate(model, state, source.folder)
    settings = PeftConfig.from_pretrained(str(source.folder))
    if any(name != "lm_head" for name in getattr(settings, "modules_to_save", None) or []):
        raise CheckpointError(
            f"{source.folder} replaces whole modules ({settings.modules_to_save}); merge it yourself."
        )
    settings.modules_to_save = None
    settings.target_modules = sorted(named)
    settings.exclude_modules = None
    settings.inference_mode = True
    settings.task_type = None
    adapted = get_peft_model(model, settings)
    report: Any = set_peft_model_state_dict(adapted, state)
    missing = [name for name in report.missing_keys if "lora_" in name]
    if report.unexpected_keys or missing:
        wrong = sorted([*report.unexpected_keys, *missing])
        raise CheckpointError(f"{source.folder} does not fit {full.folder}: {len(wrong)} tensors, first {wrong[0]}.")
    merged = adapted.merge_and_unload(safe_merge=True)
    merged.save_pretrained(part)
    return "merged"


def _translate(
    model: nn.Module, state: dict[str, torch.Tensor], folder: Path
) -> tuple[set[str], dict[str, torch.Tensor]]:
    """Return the adapted modules under the names they have in ``model``, and the adapter's tensors renamed alike."""
    ours = {_canonical(name): name for name, module in model.named_modules() if hasattr(module, "weight")}
    named, renamed, lost = set(), {}, []
    for key, tensor in state.items():
        match = _ADAPTER_PART.search(key)
        module = key[: match.start()].removeprefix("base_model.model.") if match else key
        name = ours.get(_canonical(module))
        if match is None or name is None:
            lost.append(key)
            continue
        named.add(name)
        renamed[f"base_model.model.{name}{key[match.start() :]}"] = tensor
    if lost or not named:
        first = f", first {lost[0]}" if lost else ""
        raise CheckpointError(
            f"{folder} was not made for this base: {len(lost)} of its {len(state)} tensors belong to modules that the "
            f"base does not have{first}. Give the base it was trained on with --base."
        )
    return named, renamed


def _canonical(name: str) -> str:
    """One spelling for a module, whatever version of transformers named it."""
    parts = [part for part in name.split(".") if part not in ("model", "vision_model")]
    if parts and parts[0] in ("layers", "embed_tokens", "norm"):
        parts.insert(0, "language_model")
    return ".".join(parts)
