"""Inspection of a checkpoint folder before its conversion: configuration, weight files, model family."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from unime_st.backbones.families import FAMILIES, Family
from unime_st.files import Json, read_json
from unime_st.paths import TINY
from unime_st.recipes import RECIPES, Recipe

_ELSEWHERE = {
    "internvl_chat": "the repositories that end in -hf, e.g. OpenGVLab/InternVL3-8B-hf",
    "llava_mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_qwen": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
}


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Source:
    """An inspected checkpoint on disk.

    Args:
        folder: Its folder.
        config: Content of ``config.json``; empty for an adapter.
        weights: Weight files, complete and readable.
        tensors: Shape of every tensor by its name.
        adapter: Content of ``adapter_config.json`` when this is a LoRA or DoRA adapter.
    """

    folder: Path
    config: Json
    weights: tuple[Path, ...]
    tensors: dict[str, tuple[int, ...]] = field(repr=False)
    adapter: Json | None = None

    @property
    def model_type(self) -> str:
        """``model_type`` of the configuration, ``"?"`` when there is none."""
        return str(self.config.get("model_type", "?"))


def read_source(folder: str | Path) -> Source:
    """Inspect the folder of a model or an adapter: its configuration, and the header and length of every weight file.

    Raises:
        CheckpointError: There is no such folder, a file is missing, damaged or of a kind that is not read.

    Example:
        >>> read_source("no/such/folder")
        Traceback (most recent call last):
        unime_st.checkpoints.source.CheckpointError: No folder no/such/folder. ...
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"No folder {folder}. Give a local download, or run `unime pull ALIAS` to fetch one.")
    leftovers = sorted(path.name for path in folder.rglob("*.incomplete"))
    if leftovers:
        raise CheckpointError(f"{folder} is half-downloaded ({leftovers[0]} is there). Let the download finish first.")
    adapter = _read_json(folder / "adapter_config.json") if (folder / "adapter_config.json").is_file() else None
    config_file = folder / "config.json"
    if adapter is None and not config_file.is_file():
        raise CheckpointError(f"{folder} has no config.json, so it is not a model in transformers' layout.")
    config = _read_json(config_file) if config_file.is_file() else {}
    weights = _weight_files(folder, "adapter_model" if adapter is not None else "model")
    tensors: dict[str, tuple[int, ...]] = {}
    for path in weights:
        tensors.update(read_header(path))
    return Source(folder, config, weights, tensors, adapter)


def _read_json(path: Path) -> Json:
    try:
        return read_json(path, remedy="download it again")
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _weight_files(folder: Path, stem: str) -> tuple[Path, ...]:
    """Names of the weight files from the index or the folder; all must exist."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            what = f"{len(missing)} of {len(names)} weight files are missing ({', '.join(missing[:3])})"
            raise CheckpointError(f"{folder}: {what}. The download is incomplete; let it finish.")
        return tuple(folder / name for name in names)
    single = folder / f"{stem}.safetensors"
    if single.exists():
        return (single,)
    if single.is_symlink():
        raise CheckpointError(f"{single} links to {os.readlink(single)}, which is gone. Download or convert again.")
    old = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if old:
        raise CheckpointError(
            f"{folder} has weights only as {old[0]}, which can run code when opened. Save them as safetensors first: "
            "load the model with transformers in an environment you trust and call save_pretrained."
        )
    raise CheckpointError(f"{folder} has no {stem}.safetensors. The download is incomplete; let it finish.")


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file, which is checked to be complete.

    Raises:
        CheckpointError: The file is cut off, damaged, or not safetensors.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        small = path.stat().st_size < 1024
        hint = "It holds a git-lfs pointer. " if small and path.read_bytes().startswith(b"version https") else ""
        raise CheckpointError(
            f"{path} is incomplete or damaged ({error}). {hint}Delete it and download it again."
        ) from error


def family_of(source: Source, recipe: Recipe) -> Family:
    """Family of a recipe, after checking that the checkpoint belongs to it.

    Raises:
        CheckpointError: It is of another family; the message names the recipes that fit.
    """
    family = FAMILIES[recipe.family]
    if source.model_type in (*family.model_types, f"unime_{family.name}"):
        return family
    if family.name == "any" and source.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return family
    fitting = [
        name
        for name, other in RECIPES.items()
        if name != TINY  # made here from scratch, not a recipe for other weights
        and source.model_type in (*FAMILIES[other.family].model_types, f"unime_{other.family}")
    ]
    if fitting:
        hint = f"Recipes for it: {', '.join(fitting)}."
    elif source.model_type in _ELSEWHERE:
        hint = f"This is its publisher's own layout; transformers reads {_ELSEWHERE[source.model_type]}."
    elif source.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        hint = "No recipe is made for this type; use --recipe bare."
    else:
        known = sorted({kind for row in FAMILIES.values() for kind in row.model_types})
        hint = f"Families that can be converted: {', '.join(known)}."
    raise CheckpointError(
        f"{source.folder} has model type {source.model_type!r}, but recipe {recipe.name!r} is for {recipe.family!r}. {hint}"
    )
