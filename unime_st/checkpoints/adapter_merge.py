"""Merging a LoRA or DoRA adapter into its base model, exactly or not at all."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel

from unime_st.checkpoints.source import CheckpointError, Source
from unime_st.recipes import Recipe

logger = logging.getLogger(__name__)

_LORA_PART = re.compile(r"\.lora_")
_WRAPPERS = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")
"""Names that peft puts between a module and its parameter."""
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
"""Options of :class:`peft.LoraConfig` that change the arithmetic in a way that is not handled here."""


def write_merged(part: Path, source: Source, full: Source, config: PreTrainedConfig, recipe: Recipe) -> str:
    """Merge an adapter into its base model, ``full``, and save the weights beside the configuration in ``part``.

    peft does the arithmetic (LoRA, rsLoRA, DoRA, patterns of ranks and alphas). Only names are translated: released
    adapters were trained on models whose modules had other names in older versions of transformers. Tensors that
    replace parameters of the base (``modules_to_save``, biases) are copied.

    Returns:
        ``"merged"``, for the record.

    Raises:
        CheckpointError: The adapter is of a kind that cannot be merged, is incomplete, or does not fit the base.
    """
    settings = _settings(source)
    auto = AutoModelForMultimodalLM if recipe.task == "reranker" else AutoModel
    model = auto.from_pretrained(full.folder, config=config)
    state = {name: tensor for path in source.weights for name, tensor in load_file(path).items()}
    lora, replaced = _translate(model, state, source.folder)
    original = {name: module for name, (module, _) in lora.items()}
    _check_complete(model, original, settings, source.folder)
    _set_ranks_and_alphas(settings, lora, source.folder)
    _replace_parameters(model, replaced, source.folder)
    settings.target_modules = list(lora)
    settings.modules_to_save = settings.exclude_modules = settings.layers_to_transform = settings.layers_pattern = None
    settings.bias = "none"
    settings.inference_mode = True
    settings.task_type = None
    adapted: Any = get_peft_model(model, settings)
    tensors = {f"base_model.model.{name}{end}": t for name, (_, named) in lora.items() for end, t in named.items()}
    report: Any = set_peft_model_state_dict(adapted, tensors)
    missing = [name for name in report.missing_keys if "lora_" in name]
    if report.unexpected_keys or missing:
        wrong = sorted([*report.unexpected_keys, *missing])
        raise CheckpointError(f"{source.folder} does not fit {full.folder}: {len(wrong)} tensors, first {wrong[0]}.")
    merged = adapted.merge_and_unload(safe_merge=True)
    merged.save_pretrained(part)
    return "merged"


def _settings(source: Source) -> LoraConfig:
    kind = str((source.adapter or {}).get("peft_type", "LORA")).upper()
    settings = PeftConfig.from_pretrained(str(source.folder)) if kind == "LORA" else None
    if not isinstance(settings, LoraConfig):
        raise CheckpointError(
            f"{source.folder} is an adapter of type {kind}; only LoRA and its variants (rsLoRA, DoRA, PiSSA) can be "
            "merged. Merge it with the library that trained it and convert the merged model."
        )
    if used := [name for name in _UNSUPPORTED if getattr(settings, name, None)]:
        raise CheckpointError(
            f"{source.folder} uses {', '.join(used)}, which cannot be merged here. Merge it with peft "
            "(merge_and_unload) and convert the merged model."
        )
    return settings


Lora = dict[str, tuple[str, dict[str, torch.Tensor]]]
"""For each adapted module, by its name in the model: its name in the adapter, and its tensors by the end of their names."""


def _translate(
    model: nn.Module, state: Mapping[str, torch.Tensor], folder: Path
) -> tuple[Lora, dict[str, torch.Tensor]]:
    """Return the adapted modules and the tensors that replace parameters, both by their names in ``model``."""
    modules = {_canonical(name): name for name, module in model.named_modules() if hasattr(module, "weight")}
    parameters = {_canonical(name): name for name, _ in model.named_parameters(remove_duplicate=False)}
    lora: Lora = {}
    replaced: dict[str, torch.Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        name = key.removeprefix("base_model.model.")
        if (match := _LORA_PART.search(name)) is not None:
            module = name[: match.start()]
            if (ours := modules.get(_canonical(module))) is not None:
                lora.setdefault(ours, (module, {}))[1][name[match.start() :]] = tensor
                continue
        elif (ours := parameters.get(_canonical(_WRAPPERS.sub("", name)))) is not None:
            replaced[ours] = tensor
            continue
        elif _canonical(name).startswith("lm_head."):
            logger.info("%s: %s is left out, an embedding model has no language head", folder, key)
            continue
        unknown.append(key)
    if unknown or not lora:
        first = f", first {unknown[0]}" if unknown else ""
        raise CheckpointError(
            f"{folder} was not made for this base: {len(unknown)} of its {len(state)} tensors belong to modules that the "
            f"base does not have{first}. Give the base it was trained on with --base."
        )
    return lora, replaced


def _canonical(name: str) -> str:
    """One spelling for a module, whatever version of transformers named it."""
    parts = [part for part in name.split(".") if part not in ("model", "vision_model")]
    if parts and parts[0] in ("layers", "embed_tokens", "norm"):
        parts.insert(0, "language_model")
    return ".".join(parts)


def _check_complete(model: nn.Module, original: Mapping[str, str], settings: LoraConfig, folder: Path) -> None:
    """Refuse an adapter whose settings name modules that its weights lack, in the stacks of layers that it adapts."""
    stacks = {}  # "language_model.layers" -> the same in the adapter's spelling
    for ours, theirs in original.items():
        (head, *_), (their_head, *_) = re.split(r"\.\d+\.", ours, maxsplit=1), re.split(r"\.\d+\.", theirs, maxsplit=1)
        stacks[head] = their_head
    missing = []
    for name, module in model.named_modules():
        head = re.split(r"\.\d+\.", name, maxsplit=1)[0]
        if name in original or head not in stacks or not hasattr(module, "weight"):
            continue
        theirs = stacks[head] + name[len(head) :]
        if check_target_module_exists(settings, theirs):
            missing.append(theirs)
    if missing:
        raise CheckpointError(
            f"{folder} is incomplete: its settings adapt {len(original) + len(missing)} modules, and {len(missing)} of "
            f"them have no tensors, first {missing[0]}. Copy the adapter again."
        )


def _set_ranks_and_alphas(settings: LoraConfig, lora: Lora, folder: Path) -> None:
    """Set rank and alpha of every module under its name in the model; patterns are in the adapter's spelling."""
    ranks, alphas = {}, {}
    rank_pattern, alpha_pattern = settings.rank_pattern or {}, settings.alpha_pattern or {}
    for pattern in (*rank_pattern, *alpha_pattern):
        if not any(_matches(pattern, module) for module, _ in lora.values()):
            raise CheckpointError(
                f"{folder}: {pattern!r} in rank_pattern or alpha_pattern matches none of the {len(lora)} adapted "
                "modules, so the scale of some of them is unknown. Correct adapter_config.json."
            )
    for name, (module, tensors) in lora.items():
        rank, alpha = _value(rank_pattern, module), _value(alpha_pattern, module)
        found = next(
            (t.shape[0] for end, t in tensors.items() if ".lora_A." in end), settings.r if rank is None else rank
        )
        if found != (settings.r if rank is None else rank):
            raise CheckpointError(
                f"{folder}: {module} has tensors of rank {found}, adapter_config.json says "
                f"{settings.r if rank is None else rank}. Correct r or rank_pattern."
            )
        exact = f"^{re.escape(name)}"
        if rank is not None:
            ranks[exact] = rank
        if alpha is not None:
            alphas[exact] = alpha
    settings.rank_pattern, settings.alpha_pattern = ranks, alphas


def _matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None  # as peft does


def _value(patterns: Mapping[str, int], module: str) -> int | None:
    return next((value for pattern, value in patterns.items() if _matches(pattern, module)), None)


def _replace_parameters(model: PreTrainedModel, replaced: Mapping[str, torch.Tensor], folder: Path) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in replaced.items():
        if parameters[name].shape != tensor.shape:
            raise CheckpointError(
                f"{folder} replaces {name} by a tensor of shape {tuple(tensor.shape)}, the base has "
                f"{tuple(parameters[name].shape)}. Merge it with peft (merge_and_unload) and convert the merged model."
            )
        parameters[name].data.copy_(tensor)
