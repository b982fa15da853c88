"""Conversion of a checkpoint, an adapter or a bare backbone to a native Sentence Transformers folder (`unime convert`)."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoProcessor, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from unime_st import backbones
from unime_st._version import __version__
from unime_st.backbones.families import Family
from unime_st.backbones.video_frames import accepts_video
from unime_st.checkpoints.card import write_card
from unime_st.checkpoints.native_folder import CONVERSION_RECORD, link_file, quiet_transformers, write_modules
from unime_st.checkpoints.source import CheckpointError, Source, family_of, read_source
from unime_st.files import atomic_folder, folder_lock, write_json
from unime_st.paths import local_folder
from unime_st.recipes import ImageRule, Recipe, get_recipe

logger = logging.getLogger(__name__)

_HEAD = ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight")

_ABSENT_PARTS = """\
{%- set kept = namespace(messages=[]) -%}{%- for message in messages -%}
{%- set content = message.content if message.content is string or message.content is not iterable else \
(message.content | rejectattr("text", "none") | rejectattr("image", "none") | list) -%}
{%- set kept.messages = kept.messages + [dict(message, content=content)] -%}{%- endfor -%}
{%- set messages = kept.messages -%}
"""
"""In front of a checkpoint's own chat template: parts that are None are absent, where they would be read as words."""


@dataclass(frozen=True)
class Options:
    """Options of a conversion, see :func:`convert`."""

    alias: str | None = None
    base: str | Path | None = None
    processor: str | Path | None = None
    image_size: str | int | None = None
    image_backend: str | None = None
    dtype: str | None = None
    style: str | None = None
    revision: str | None = None

    @property
    def asks_for_image_rule(self) -> bool:
        """Whether an option needs a processor with an image rule."""
        return self.image_size not in (None, "native", "official") or self.image_backend is not None


def convert(
    folder: str | Path,
    recipe: str | Recipe,
    *,
    output: str | Path | None = None,
    alias: str | None = None,
    base: str | Path | None = None,
    processor: str | Path | None = None,
    image_size: str | int | None = None,
    image_backend: str | None = None,
    dtype: str | None = None,
    style: str | None = None,
    template: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a local checkpoint to a native Sentence Transformers folder.

    The weights are linked, not copied, except where an adapter has to be merged into its base model.

    Args:
        folder: Full model, or LoRA/DoRA adapter, in transformers' or peft's layout.
        recipe: Name of a recipe (:data:`unime_st.recipes.RECIPES`) or a recipe.
        output: Folder to write.
        alias: Name under which ``SentenceTransformer(alias)`` finds the model; writes ``$UNIME_HOME/models/<alias>``.
            Default without ``output`` is the name of the recipe.
        base: Folder of the base model; for an adapter.
        processor: Folder of tokenizer and image processor, where ``folder`` (or ``base``) has none.
        image_size: ``"official"`` (default), ``"training"``, ``"native"``, or the side of a square in pixels.
        image_backend: ``"pil"`` or ``"torchvision"``; default as in the recipe.
        dtype: Type to load the weights in, e.g. ``"float32"``; default as stored, ``"official"`` as in the recipe.
        style: Prompt style of the template, e.g. ``"mmeb"`` for UniME v1; default is the first one.
        template: File of a chat template to use instead of the recipe's.
        revision: Commit that ``folder`` was downloaded at, for the record.
        overwrite: Replace an existing folder.

    Returns:
        Path: The new folder.

    Raises:
        CheckpointError: The folder is incomplete, damaged, or does not fit the recipe.
        FileExistsError: The output exists and ``overwrite`` is False.
        FolderInUseError: Another process writes to the output.
        ValueError: An option is wrong.

    Example:
        >>> convert("UniME-V2-Qwen2VL-2B", "unime-v2-2b", alias="unime-v2-2b")       # doctest: +SKIP
    """
    if output is not None and alias is not None:
        raise ValueError("Give an output folder (--output) or a name (--alias), not both.")
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    if template is not None:
        recipe = replace(recipe, template=str(Path(template).resolve()))
    if output is None:
        alias = alias or recipe.name
        target = local_folder(alias)
    else:
        target = Path(output)
    options = Options(alias, base, processor, image_size, image_backend, dtype, style, revision)
    with folder_lock(target, wait=False):
        return convert_to(target, folder, recipe, options, overwrite=overwrite)


def convert_to(target: Path, folder: str | Path, recipe: Recipe, options: Options, *, overwrite: bool) -> Path:
    """Convert a checkpoint; for callers that hold the lock of the target, see :func:`unime_st.files.folder_lock`."""
    backbones.register()
    source = read_source(folder)
    full = _full_source(source, options.base)
    family = family_of(full, recipe)
    ours = _needs_our_classes(recipe, family, options)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Choose another --output or --alias, or add --overwrite.")
    with atomic_folder(target, overwrite=overwrite) as part:
        config = _write_config(part, full, recipe, family, ours, options.dtype)
        processor = _processor(full, recipe, family, ours, options)
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if positions and processor.tokenizer.model_max_length > positions:  # often "none", the number 1e30
            _set_and_save(processor.tokenizer, "model_max_length", positions)
        processor.save_pretrained(part)
        if source.adapter is not None:
            from unime_st.checkpoints.adapter_merge import write_merged

            weights = [write_merged(part, source, full, config, recipe)]
        else:
            weights = [link_file(path, part / path.name) for path in source.weights]
            for index in source.folder.glob("model.safetensors.index.json"):
                link_file(index, part / index.name)
        _check_weights(part, recipe)
        write_modules(
            part,
            recipe,
            dimension=int(config.get_text_config().hidden_size),
            processing_kwargs=_processing_kwargs(recipe, ours, options.style, processor),
            yes_no_ids=_answer_ids(processor.tokenizer, recipe) if recipe.task == "reranker" else None,
            needs_unime_st=ours,
            takes_video=accepts_video(processor) and "video" in str(processor.chat_template),
        )
        record = {
            "recipe": recipe.name,
            "source": str(source.folder.resolve()),
            "base": str(full.folder.resolve()) if source.adapter is not None else None,
            "hub_id": recipe.hub_id,
            "revision": options.revision,
            "weights": sorted(set(weights)),
            "unime_st": __version__,
        }
        write_json(part / CONVERSION_RECORD, record)
        write_card(part, recipe, alias=options.alias, record=record, processor=processor)
    logger.info("%s is ready", target)
    return target


def _full_source(source: Source, base: str | Path | None) -> Source:
    """Return the model that configuration and processor come from: the checkpoint itself, or the base of an adapter."""
    if source.adapter is None:
        if base is not None:
            raise CheckpointError(f"{source.folder} is a whole model, so --base makes no sense. Leave --base out.")
        return source
    if base is None:
        named = source.adapter.get("base_model_name_or_path") or "its base model"
        raise CheckpointError(f"{source.folder} is an adapter. Give the folder of {named} with --base.")
    full = read_source(base)
    if full.adapter is not None:
        raise CheckpointError(f"--base {full.folder} is an adapter itself. Give the folder of a whole model.")
    return full


def _needs_our_classes(recipe: Recipe, family: Family, options: Options) -> bool:
    """Whether transformers' own classes cannot do what the recipe and the options ask for."""
    asked = options.asks_for_image_rule
    rule = recipe.image is not None and not recipe.image.stock
    if (rule or asked) and family.module is None:
        raise ValueError(
            f"{family.name} has no image rule here: its images go to its own image processor as they are. Leave "
            "--image-size and --image-backend out."
        )
    return rule or recipe.positions != "native" or asked or not family.native


def _write_config(
    part: Path, full: Source, recipe: Recipe, family: Family, ours: bool, dtype: str | None
) -> PreTrainedConfig:
    config: PreTrainedConfig = family.read_config(full.folder)
    vars(config).pop("auto_map", None)  # names of the publisher's own classes, which are never run
    if ours and config.model_type in family.model_types:
        content = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        config = family.load("config").from_dict(content)
        if hasattr(config, "image_positions"):
            config.image_positions = "1d" if recipe.positions == "1d" else "3d"
    if dtype is not None:
        name = recipe.dtype if dtype == "official" else dtype
        kind = getattr(torch, name, None)
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise ValueError(f"dtype {dtype!r}: use 'official', 'float32', 'bfloat16' or 'float16'.")
        config.dtype = kind
    if ours:
        config.architectures = [family.load("generator" if recipe.task == "reranker" else "model").__name__]
    config.save_pretrained(part)
    return config


def _processor(full: Source, recipe: Recipe, family: Family, ours: bool, options: Options) -> ProcessorMixin:
    """Load tokenizer and image processor, with the template and limits of the recipe."""
    where = Path(options.processor) if options.processor is not None else full.folder
    if not any((where / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        theirs = recipe.processor_hub_id or recipe.base_model or "its base model"
        raise CheckpointError(f"{where} has no tokenizer. Give a download of {theirs} with --processor.")
    if not any((where / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        theirs = recipe.processor_hub_id or recipe.base_model or "its base model"
        raise CheckpointError(f"{where} has no image processor. Give a download of {theirs} with --processor.")
    if ours:
        rule = recipe.image or ImageRule(backend="torchvision")
        processor = family.load("processor").from_pretrained(
            where,
            trust_remote_code=False,
            image_rule=asdict(rule),
            image_size=options.image_size or "official",
            image_backend=options.image_backend,
        )
    else:
        processor = AutoProcessor.from_pretrained(where, trust_remote_code=False)
    if recipe.image is not None:
        limits = {"shortest_edge": recipe.image.min_pixels, "longest_edge": recipe.image.max_pixels}
        if limits := {key: value for key, value in limits.items() if value is not None}:
            processor.image_processor.size = {**dict(processor.image_processor.size), **limits}
    text = recipe.read_template()
    if text is not None:
        processor.chat_template, processor.tokenizer.chat_template = text, None
    elif processor.chat_template is None and processor.tokenizer.chat_template is None:
        raise CheckpointError(f"{where} has no chat template. Give one with --template FILE.")
    elif isinstance(processor.chat_template, str) and not processor.chat_template.startswith(_ABSENT_PARTS):
        processor.chat_template = _ABSENT_PARTS + processor.chat_template
    _set_and_save(processor.tokenizer, "padding_side", recipe.padding_side)
    if recipe.max_length is not None:
        _set_and_save(processor.tokenizer, "model_max_length", recipe.max_length)
    return processor


def _set_and_save(tokenizer: PreTrainedTokenizerBase, name: str, value: object) -> None:
    """Set an attribute of a tokenizer and the argument of the same name, because only arguments are saved."""
    setattr(tokenizer, name, value)
    tokenizer.init_kwargs[name] = value


def _processing_kwargs(recipe: Recipe, ours: bool, style: str | None, processor: ProcessorMixin) -> dict[str, object]:
    variables = dict(recipe.template_kwargs)
    if style is not None:
        if f"'{style}'" not in (processor.chat_template or ""):
            raise ValueError(f"The chat template of recipe {recipe.name!r} has no style {style!r}.")
        variables["style"] = style
    kwargs: dict[str, object] = {"chat_template": variables} if variables else {}
    if not ours or recipe.task == "reranker":
        # transformers' processors truncate the end of the prompt of long rows with images, where the embedding is read.
        # Ours restore it; theirs must not truncate at all. In a pair, a long query would push the candidate out, so
        # pairs are never truncated.
        kwargs["text"] = {"truncation": False}
    return kwargs


def _answer_ids(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> tuple[int, int]:
    ids = []
    for word in recipe.yes_no:
        tokens = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(tokens) != 1:
            raise CheckpointError(f"{word!r} is {len(tokens)} tokens of this tokenizer; a reranker needs one.")
        ids.append(tokens[0])
    return ids[0], ids[1]


def _check_weights(part: Path, recipe: Recipe) -> None:
    """Let transformers match names and shapes without reading the weights; any mismatch is an error."""
    from transformers import AutoModel, AutoModelForMultimodalLM

    auto = AutoModelForMultimodalLM if recipe.task == "reranker" else AutoModel
    try:
        with quiet_transformers():
            _, report = auto.from_pretrained(
                part, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"The weights do not fit their configuration: {error}") from error
    problems = [
        f"{len(names)} {what} ({', '.join(sorted(str(name) for name in names)[:3])})"
        for what, names in (
            ("are missing", report["missing_keys"]),
            ("have another shape", report["mismatched_keys"]),
            ("are unknown", {name for name in report["unexpected_keys"] if name not in _HEAD}),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            "The weights do not fit their configuration: of the tensors "
            + "; ".join(problems)
            + ". The folder is of a "
            "newer or older layout, or its files are from different models. Download it again, or update transformers."
        )
