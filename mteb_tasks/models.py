"""mteb registry entries of our models: aliases, the folder in ``$UNIME_MODEL``, and two-stage models."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError, safe_open

from mteb_tasks.metadata import model_meta
from mteb_tasks.vector_format import VectorFormat
from unime_st.backbones.video_frames import VIDEO_PROCESSORS
from unime_st.files import digest, file_digests, read_json
from unime_st.paths import PACKAGED, TINY, home, local_folder
from unime_st.recipes import RELEASED
from unime_st.registry import is_alias, known_aliases, resolve

if TYPE_CHECKING:
    from mteb.models import ModelMeta

    from mteb_tasks.loader import UniMELoader
    from mteb_tasks.two_stage import TwoStage

MODEL_VARIABLE = "UNIME_MODEL"
RERANKER_VARIABLE = "UNIME_RERANKER"
ORDER_VARIABLE = "UNIME_PAIR_ORDER"
ALPHA_VARIABLE = "UNIME_FUSION_ALPHA"
DIMENSION_VARIABLE = "UNIME_TRUNCATE_DIM"
PRECISION_VARIABLE = "UNIME_PRECISION"
CACHE_VARIABLE = "UNIME_EMBEDDING_CACHE"
LOCAL_MODEL = "unime-local"
_RELEASES = {
    "unime-v2": (3584, 8_030_807_584, "2025-10-15"),
    "unime-v2-2b": (1536, 2_208_985_600, "2025-10-15"),
    "unime-v2-7b": (3584, 8_291_375_616, "2025-10-15"),
    "unime-v1-phi3.5": (3072, None, "2025-04-24"),
    "unime-v1-llava1.6": (4096, None, "2025-04-24"),
    "unime-v1-llava-ov": (3584, None, None),
}
"""Width, parameters and date of the released models, None where unknown; those of Qwen2-VL follow from its sizes."""
_VIDEO_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "llava_onevision")
"""Families of released models that take videos."""
RELEASED_RERANKER = "unime-v2-reranker"


def load_embedder(name: str, revision: str | None = None, **kwargs: Any) -> UniMELoader:
    """Load the embedding model that mteb knows under `name`.

    Args:
        name: ``unime/<alias>``; ``unime/unime-local`` stands for the folder in ``$UNIME_MODEL``.
        revision: Revision under which results are filed.
        **kwargs: ``device``, ``truncate_dim`` and ``precision`` (see `mteb_tasks.vector_format.VectorFormat`) and further
            arguments of the model. mteb takes the two from the model's description, where ``$UNIME_TRUNCATE_DIM`` and
            ``$UNIME_PRECISION`` put them.

    Returns:
        The model. Embeddings are kept in ``$UNIME_HOME/embeddings`` from run to run, unless
        ``UNIME_EMBEDDING_CACHE=0``.
    """
    from mteb_tasks.loader import UniMELoader
    from unime_st.model import UniME

    device = kwargs.pop("device", None)
    shape: dict[str, Any] = {key: kwargs.pop(key) for key in ("truncate_dim", "precision") if key in kwargs}
    folder = _folder(name.removeprefix("unime/"))
    model = UniME(str(folder), device=device, **kwargs)
    cache = cache_folder(folder, str(model.dtype), kwargs)  # whole vectors
    return UniMELoader(name, revision, model=model, cache_folder=cache, **shape)


def load_two_stage(name: str, revision: str | None = None, **kwargs: Any) -> TwoStage:
    """Load the embedder and the reranker that mteb knows as one model.

    Args:
        name: ``unime/<alias>+reranker``; for ``unime-local`` the reranker is the folder in ``$UNIME_RERANKER``.
        revision: Revision under which results are filed.
        **kwargs: ``device`` and further arguments of the embedder; ``top_k``, ``method``, ``pair_order`` and ``alpha``
            are those of `TwoStage`. The last two may also stand in ``$UNIME_PAIR_ORDER`` and ``$UNIME_FUSION_ALPHA``, and
            make ``method`` "pairwise".

    Returns:
        The search model.

    Raises:
        ValueError: If a setting is wrong.
    """
    from mteb_tasks.two_stage import TwoStage
    from unime_st.reranking import UniMEReranker

    settings: dict[str, Any] = {
        key: kwargs.pop(key) for key in ("top_k", "method", "pair_order", "alpha") if key in kwargs
    }
    settings = {**_ranking_settings(), **settings}
    if isinstance(alpha := settings.get("alpha"), str):
        raise ValueError(f"{ALPHA_VARIABLE} must be a number, got {alpha!r}")
    if settings.keys() & {"pair_order", "alpha"}:
        settings.setdefault("method", "pairwise")
    embedder = load_embedder(name.removesuffix("+reranker"), revision, **dict(kwargs))
    source = os.environ.get(RERANKER_VARIABLE) or RELEASED_RERANKER
    reranker: Any = UniMEReranker(str(resolve(source)), device=kwargs.get("device"))
    side = getattr(embedder.model.processor, "image_side", None)
    theirs = reranker.processor
    if side is not None and getattr(theirs, "image_size", None) == "official":
        theirs.set_image_rule(theirs.image_rule, side, theirs.image_backend)
    return TwoStage(embedder, reranker, name=name, **settings)


def _ranking_settings() -> dict[str, str | float]:
    """Settings of two-stage models in the environment; a fusion weight that is not a number stays a text."""
    order, alpha = os.environ.get(ORDER_VARIABLE), os.environ.get(ALPHA_VARIABLE)
    found: dict[str, str | float] = {"pair_order": order} if order else {}
    if alpha:
        found["alpha"] = alpha
        with suppress(ValueError):
            found["alpha"] = float(alpha)
    return found


def _vector_settings() -> dict[str, object]:
    """Dimension and precision of the embeddings in the environment.

    Raises:
        ValueError: If a value is wrong.
    """
    dimension, precision = os.environ.get(DIMENSION_VARIABLE), os.environ.get(PRECISION_VARIABLE)
    if dimension and not dimension.isdecimal():
        raise ValueError(f"{DIMENSION_VARIABLE} must be a number of dimensions, got {dimension!r}")
    return VectorFormat(int(dimension) if dimension else None, cast(Any, precision or None)).experiment


def cache_folder(folder: Path, dtype: str, settings: dict[str, object]) -> Path | None:
    """Where the embeddings of a model at a setting are kept.

    Args:
        folder: Model folder; its content, which includes template and image size, is part of the key.
        dtype: Type the model computes in.
        settings: Arguments the model was loaded with.

    Returns:
        A folder of its own for this model and setting, or None with ``UNIME_EMBEDDING_CACHE=0``.
    """
    if os.environ.get(CACHE_VARIABLE, "1").lower() in ("0", "false", "no", "off"):
        return None
    key = digest(f"{folder_revision(folder)} {dtype} {sorted(settings.items())}", length=24)
    return home() / "embeddings" / key


def folder_revision(folder: Path) -> str:
    """Digest of a model folder that changes with its configuration, templates and weights.

    Args:
        folder: Model folder.

    Returns:
        16 hexadecimal digits. Every byte counts; large files are read once, see :func:`unime_st.files.file_digests`.
    """
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"
    )
    return digest(*(f"{name} {found}\n" for name, found in file_digests(folder, names).items()), length=16)


def metas() -> dict[str, ModelMeta]:
    """Describe every model for mteb's registry.

    Returns:
        Name for ``mteb run -m`` to description. The revision of a model on this machine is the digest of its folder,
        of two stages that of both folders, so that results of another model under the same name are never taken for
        its own.
    """
    embedders = [alias for alias in known_aliases() if _embeds(alias)]
    if os.environ.get(MODEL_VARIABLE):
        embedders.append(LOCAL_MODEL)
    second = os.environ.get(RERANKER_VARIABLE)
    second_revision = _revision(second or RELEASED_RERANKER)
    second_modalities = _modalities(second or RELEASED_RERANKER)
    shape = _vector_settings()
    found: dict[str, ModelMeta] = {}
    for alias in embedders:
        revision = _revision(os.environ[MODEL_VARIABLE] if alias == LOCAL_MODEL else alias)
        facts = {**_facts(alias), "experiment_kwargs": shape or None}
        found[alias] = model_meta(f"unime/{alias}", revision, loader=load_embedder, **facts)
        if alias.startswith("unime-v2") or (alias in (LOCAL_MODEL, TINY) and second):
            name, both = f"{alias}+reranker", digest(f"{revision} {second_revision}", length=16)
            meta = model_meta(f"unime/{name}", both, loader=load_two_stage, **facts)
            # mteb replaces the model's own description by this one, and files results by it.
            shared = [modality for modality in meta.modalities if modality in second_modalities]
            changed = {"experiment_kwargs": {**shape, **_ranking_settings()} or None, "modalities": shared}
            found[name] = meta.model_copy(update=changed)
    return found


def check_variables(name: str) -> None:
    """Refuse a model whose environment variables are not set; mteb's own message would only be "not found".

    Args:
        name: What was passed to ``mteb run -m``.

    Raises:
        ValueError: Names the variables to set.

    Example:
        >>> check_variables("unime-v2+reranker")
    """
    alias, two_stages, _ = name.removeprefix("unime/").partition("+reranker")
    needed = [MODEL_VARIABLE] if alias == LOCAL_MODEL else []
    needed += [RERANKER_VARIABLE] if two_stages and alias in (LOCAL_MODEL, TINY) else []
    unset = [variable for variable in needed if not os.environ.get(variable)]
    if unset:
        raise ValueError(f"{name} takes its folders from {' and '.join(needed)}: set {' and '.join(unset)}")


def follows_variables(name: str) -> bool:
    """Whether environment variables name the folders of a model, so that its description may change.

    Args:
        name: Name for mteb.

    Example:
        >>> follows_variables("unime-v2"), follows_variables("unime/unime-local")
        (False, True)
    """
    alias, two_stages, _ = name.removeprefix("unime/").partition("+reranker")
    return alias == LOCAL_MODEL or (bool(two_stages) and is_alias(alias))


def _embeds(alias: str) -> bool:
    """Whether an alias stands for an embedding model, and not for a reranker."""
    if alias in RELEASED:
        return RELEASED[alias].task == "embedding"
    settings = local_folder(alias) / "config_sentence_transformers.json"
    return not settings.is_file() or read_json(settings).get("model_type") != "CrossEncoder"


def _facts(alias: str) -> dict[str, object]:
    """What mteb's filters ask for: sizes measured in the folder of the model, or those of the release."""
    recipe = RELEASED.get(alias)
    found: dict[str, object] = {}
    if alias in _RELEASES:
        width, parameters, date = _RELEASES[alias]
        found = {"embed_dim": width, "n_parameters": parameters, "release_date": date}
        # Weights are released in 16 bits.
        found["memory_usage_mb"] = None if parameters is None else parameters * 2 / 2**20
    folder = _folder_here(os.environ[MODEL_VARIABLE] if alias == LOCAL_MODEL else alias)
    with suppress(ValueError, OSError, KeyError, SafetensorError):
        found |= _measured(folder) if folder is not None else {}
    found["modalities"] = _modalities(os.environ[MODEL_VARIABLE] if alias == LOCAL_MODEL else alias)
    if recipe is not None:
        reference = f"https://huggingface.co/{recipe.hub_id}" if recipe.hub_id else None
        found |= {"license": recipe.license, "reference": reference, "adapted_from": recipe.base_model}
    return {**found, "open_weights": True} if recipe is not None or alias == TINY else found


def _measured(folder: Path) -> dict[str, int | float]:
    config = read_json(folder / "config.json")
    files, parameters = list(folder.glob("*.safetensors")), 0
    for file in files:
        with safe_open(file, "np") as tensors:
            parameters += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    size = sum(file.stat().st_size for file in files) / 2**20
    width = config.get("text_config", config)["hidden_size"]
    return {"embed_dim": width, "n_parameters": parameters, "memory_usage_mb": size}


def _modalities(name: str) -> list[str]:
    """Modalities of the model that an alias or a path stands for, by its folder, or its family before it is here."""
    folder, recipe = _folder_here(name), RELEASED.get(name)
    takes_video = folder is None and recipe is not None and recipe.family in _VIDEO_FAMILIES
    if folder is not None:
        with suppress(ValueError, OSError):
            videos = read_json(folder / "processor_config.json").get("video_processor") or {}
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
            takes_video = videos.get("video_processor_type") in VIDEO_PROCESSORS and "video" in template
    return ["text", "image", *(["video"] if takes_video else [])]


def _folder(alias: str) -> Path:
    if alias != LOCAL_MODEL:
        return resolve(alias)
    named = os.environ.get(MODEL_VARIABLE)
    if not named:
        raise ValueError(f"{LOCAL_MODEL} stands for the folder in ${MODEL_VARIABLE}, which is not set")
    return resolve(named)


def _folder_here(name: str) -> Path | None:
    """Folder that an alias or a path stands for; None for a model that is not on this machine."""
    folders = [Path(name).expanduser()]
    folders += [local_folder(name)] if is_alias(name) else []
    folders += [PACKAGED] if name == TINY else []
    return next((folder for folder in folders if folder.is_dir()), None)


def _revision(name: str) -> str:
    """Digest of the folder that an alias or a path stands for; the pinned commit of a model that is not here yet."""
    if (folder := _folder_here(name)) is not None:
        return folder_revision(folder)
    recipe = RELEASED.get(name)
    return (recipe.revision if recipe else None) or "main"
