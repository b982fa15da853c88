"""Export of a model to a folder that stock transformers and Sentence Transformers load without this package."""

from __future__ import annotations

import base64
import inspect
import io
import json
import logging
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES

from unime_st import backbones
from unime_st.backbones.families import FAMILIES
from unime_st.backbones.image_rules import prepare_image
from unime_st.checkpoints.card import write_plain_card
from unime_st.checkpoints.checks import sample_image
from unime_st.checkpoints.native_folder import link_file, quiet_transformers
from unime_st.checkpoints.parity import PARITY, Probe, mistaken_vectors
from unime_st.checkpoints.source import CheckpointError, Source, read_source
from unime_st.files import Json, atomic_folder, folder_lock, read_json, write_json
from unime_st.paths import AliasError, find_model
from unime_st.recipes import ImageRule

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""Largest cosine distance of a vector, or difference of a score, from the original in float32."""
_OURS = "unime_"
_BERT, _SETTINGS = "sentence_bert_config.json", "config_sentence_transformers.json"
_TEXTS = ("a red circle", "Which of the two squares on the left is larger, and what color is the circle?")


def export_plain(
    model: str | Path,
    output: str | Path,
    *,
    allow_drift: bool = False,
    device: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Export a model to a folder for stock transformers and Sentence Transformers, and measure what the export costs.

    The folder has a stock ``model_type`` and processor. Weights are linked. ``README.md`` says what is left to the
    client: to prepare images by the image rule. ``parity.json`` holds inputs with the vectors (scores of a reranker) of
    the original in float32; the export is loaded and compared with them before the folder gets its name.

    Args:
        model: Alias or folder of an embedding model or a reranker, with Sentence Transformers' ``modules.json``.
        output: Folder to write.
        allow_drift: Export also what stock classes cannot express, with other vectors. Defaults to False.
        device: Where both models run, e.g. ``"cuda"``. Defaults to None, the choice of Sentence Transformers.
        overwrite: Replace the output folder. Defaults to False.

    Returns:
        Path: The output folder. ``parity.json`` has the lowest cosine of each kind of input in ``"measured"``.

    Raises:
        CheckpointError: The model is an adapter, has no stock class, or gives other vectors in stock classes.
        AliasError: There is no such model on this machine.
        FileExistsError: The output exists and ``overwrite`` is False.
        FolderInUseError: Another process writes to the output.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     folder = export_plain("unime-tiny", Path(root, "plain"), device="cpu")
        ...     read_json(folder / "config.json")["model_type"]
        'qwen2_vl'
    """
    folder, target = find_model(str(model)), Path(output)
    if folder is None:
        raise AliasError(f"Unknown model {str(model)!r}: neither a folder nor the alias of a model on this machine.")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Choose another --output, or add --overwrite.")
    backbones.register()
    with folder_lock(target, wait=False), atomic_folder(target, overwrite=overwrite) as part:
        source = _checked(folder, allow_drift=allow_drift)
        processor = AutoProcessor.from_pretrained(folder)
        _write_config(part, source)
        _stock_processor(processor).save_pretrained(part)
        for path in (*source.weights, *folder.glob("model.safetensors.index.json")):
            link_file(path, part / path.name)
        _copy_modules(part, folder, processor)
        measured = _write_parity(part, folder, processor, device)
        worst = min(measured.values())
        if worst < 1 - TOLERANCE and not allow_drift:
            raise CheckpointError(
                f"{folder} gives other vectors in stock classes: cosine {worst:.6f}, expected at least "
                f"{1 - TOLERANCE}. Accept it with --allow-drift, or serve the model with this package."
            )
        write_plain_card(part, folder, processor, measured)
    logger.info("%s is ready", target)
    return target


def _checked(folder: Path, *, allow_drift: bool) -> Source:
    """Inspect a model folder and refuse what stock classes cannot load or express."""
    source = read_source(folder)
    if source.adapter is not None:
        raise CheckpointError(
            f"{folder} is an adapter. Merge it first: `unime convert {folder} --base BASE --recipe NAME --output DIR`."
        )
    if not (folder / "modules.json").is_file():
        raise CheckpointError(
            f"{folder} has no modules.json, so it is not an embedding model. Convert it first: "
            f"`unime convert {folder} --recipe NAME --output DIR`."
        )
    family = FAMILIES.get(source.model_type.removeprefix(_OURS))
    if family is not None and not family.native:
        raise CheckpointError(f"{folder} cannot be exported: transformers has no class for {family.name}.")
    if source.config.get("image_positions") == "1d" and not allow_drift:
        raise CheckpointError(
            f"{folder} was trained with one-dimensional image positions, which transformers' Qwen2-VL cannot express: "
            "stock classes give other vectors for images. --allow-drift exports it and measures the difference."
        )
    return source


def _write_config(part: Path, source: Source) -> None:
    """Write the configuration under the stock model type, without the fields of ours."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(source.folder)
    if config.model_type.startswith(_OURS):
        stock = config.model_type.removeprefix(_OURS)
        content = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "image_positions")}
        config = AutoConfig.for_model(stock, **content)
        head = getattr(config, "tie_word_embeddings", False) or any("lm_head" in name for name in source.tensors)
        names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if head else MODEL_MAPPING_NAMES
        config.architectures = [str(names[stock])]
    config.save_pretrained(part)


def _stock_processor(processor: ProcessorMixin) -> ProcessorMixin:
    """The same parts and settings in transformers' own processor class, without the image rule."""
    kind = next(base for base in type(processor).__mro__ if base.__module__.startswith("transformers."))
    if kind is type(processor):
        return processor
    names = [name for name in inspect.signature(kind).parameters if hasattr(processor, name)]
    made: ProcessorMixin = kind(**{name: getattr(processor, name) for name in names})
    return made


def _copy_modules(part: Path, folder: Path, processor: ProcessorMixin) -> None:
    """Write the module list, the configuration of every module and the settings of Sentence Transformers."""
    shutil.copyfile(folder / "modules.json", part / "modules.json")
    for module in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        if not str(module["type"]).startswith("sentence_transformers."):
            raise CheckpointError(f"{folder} cannot be exported: its module {module['type']} is not a stock class.")
        if module["path"]:
            shutil.copytree(folder / module["path"], part / module["path"])
    transformer, settings = read_json(folder / _BERT), read_json(folder / _SETTINGS)
    if hasattr(processor, "image_rule"):
        # Stock processors truncate the end of the prompt of long rows, where the embedding is read.
        kwargs = transformer.get("processing_kwargs", {})
        transformer["processing_kwargs"] = {**kwargs, "text": {**kwargs.get("text", {}), "truncation": False}}
    settings.pop("requirements", None)
    settings.setdefault("model_type", "SentenceTransformer")
    write_json(part / _BERT, transformer)
    write_json(part / _SETTINGS, settings)


def _probes(settings: Json) -> list[Probe]:
    """Inputs to compare: texts, an image, both, and one with a prompt; pairs for a reranker."""
    text, long = _TEXTS
    if settings.get("model_type") == "CrossEncoder":
        return [Probe("pair", part, image, query=long) for part, image in ((text, False), (None, True), (text, True))]
    probes = [
        Probe("text", text),
        Probe("text", long),
        Probe("image", image=True),
        Probe("image and text", long, True),
    ]
    prompt = next((name for name, prompt in settings.get("prompts", {}).items() if prompt), None)
    return probes + ([Probe("image and text", text, True, prompt)] if prompt else [])


def _write_parity(part: Path, folder: Path, processor: ProcessorMixin, device: str | None) -> dict[str, float]:
    """Write the parity file; returns the lowest cosine of the export for each kind of input."""
    settings = read_json(part / _SETTINGS)
    probes, image = _probes(settings), sample_image()
    kind = CrossEncoder if settings.get("model_type") == "CrossEncoder" else SentenceTransformer
    side = getattr(processor, "image_side", None)
    prepared = prepare_image(image, ImageRule(**getattr(processor, "image_rule", {})), side)
    results: list[list[np.ndarray]] = []
    mistakes: list[dict[str, list[float]]] = [{} for _ in probes]
    for where, given in ((folder, image), (part, prepared)):  # one after the other: each may fill the memory
        with quiet_transformers():
            model = kind(str(where), device=device, model_kwargs={"dtype": "float32"}, local_files_only=True)
            results.append([probe.run(model, given) for probe in probes])
            if where == part and isinstance(model, SentenceTransformer):
                other = image if prepared.size != image.size else image.resize((image.width // 2, image.height // 2))
                mistakes = mistaken_vectors(model, probes, prepared, other)
        del model
    measured: dict[str, float] = {}
    items = []
    for probe, expected, found, causes in zip(probes, *results, mistakes, strict=True):
        measured[probe.kind] = min(measured.get(probe.kind, 1.0), probe.closeness(found, expected))
        prompt = settings.get("prompts", {}).get(probe.prompt_name)
        values = [float(value) for value in expected]
        items.append({**vars(probe), "prompt": prompt, "expected": values, "causes": causes})
    content = {
        "dtype": "float32",
        "image_side": side,
        "measured": measured,
        "image": _data_uri(image),
        "prepared": _data_uri(prepared),
        "items": items,
    }
    write_json(part / PARITY, content)
    return measured


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
