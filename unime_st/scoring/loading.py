"""Loader of generative vision-language models as scorers of (query, candidate) pairs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.util import load_file_path
from torch import nn
from transformers import AutoImageProcessor, ProcessorMixin

from unime_st.backbones.fast_modules import use_fast_modules
from unime_st.backbones.video_frames import resize_frames
from unime_st.paths import PACKAGED
from unime_st.registry import is_alias, resolve
from unime_st.scoring.prompts import IMAGE_TOKENS, answer_token_ids, check_template, load_template

ImageTokens = tuple[int, int]


def resolve_name(name: str | Path) -> str:
    """Resolve an alias to a folder; folders and hub repositories ("owner/name") are returned unchanged.

    Raises:
        AliasError: If the alias is unknown on this machine; the message says which command makes it.
        FileNotFoundError: If a name that can only be a path is not a folder.
    """
    name = str(name)
    if not os.path.isdir(name) and (name.startswith((".", "~", os.sep)) or name.count("/") > 1):
        raise FileNotFoundError(f"no folder {name}: pass the folder of a model, a hub repository or an alias")
    return str(resolve(name)) if not os.path.isdir(name) and is_alias(name) else name


def is_cross_encoder(folder: str) -> bool:
    """Whether a folder or hub repository was saved by a ``CrossEncoder``."""
    path = load_file_path(folder, "config_sentence_transformers.json")
    if path is None:
        return False
    saved = json.loads(Path(path).read_text(encoding="utf-8"))
    return saved.get("model_type", "SentenceTransformer") == "CrossEncoder"


def image_size_limits(processor: ProcessorMixin, image_tokens: ImageTokens | None) -> dict[str, int] | None:
    """Limits in pixels, ``{"shortest_edge": ..., "longest_edge": ...}``, for limits in visual tokens per image.

    None stands for the processor's own limits.

    Raises:
        ValueError: If the limits are out of range or this image processor does not resize by a number of tokens.
    """
    if image_tokens is None:
        return None
    minimum, maximum = image_tokens
    if not 0 < minimum <= maximum:
        raise ValueError(f"image_tokens={image_tokens}: expected (minimum, maximum) with 0 < minimum <= maximum")
    if not limits_by_tokens(processor):
        raise ValueError(
            f"image_tokens={image_tokens} needs an image processor that resizes to a range of pixels, as Qwen's do; "
            f"{type(getattr(processor, 'image_processor', processor)).__name__} does not. Leave image_tokens unset."
        )
    side = processor.image_processor.patch_size * processor.image_processor.merge_size
    return {"shortest_edge": minimum * side * side, "longest_edge": maximum * side * side}


def limits_by_tokens(processor: ProcessorMixin) -> bool:
    """Return whether the image processor resizes images to a range of pixels in whole visual tokens, as Qwen's do."""
    image_processor = getattr(processor, "image_processor", None)
    size = dict(getattr(image_processor, "size", None) or {})
    return {"shortest_edge", "longest_edge"} <= size.keys() and hasattr(image_processor, "merge_size")


def default_image_tokens(processor: ProcessorMixin, template: str | None) -> ImageTokens | None:
    """Return the image limits of a template by its name, or None where the image processor has no such limits."""
    return IMAGE_TOKENS.get(template or "") if limits_by_tokens(processor) else None


def default_template(folder: str) -> str:
    """Template of a bare checkpoint: "tiny" for ``unime-tiny``, which knows no other prompt, else "official".

    Example:
        >>> from unime_st.scoring.loading import default_template, resolve_name
        >>> default_template(resolve_name("unime-tiny")), default_template("Qwen/Qwen2.5-VL-7B-Instruct")
        ('tiny', 'official')
    """
    return "tiny" if os.path.realpath(folder) == os.path.realpath(PACKAGED) else "official"


def use_pillow(transformer: Transformer, folder: str) -> None:
    """Process images with Pillow, as the authors' code did; torchvision's pixels differ by 1/255."""
    processor = transformer.processor
    # Processors from elsewhere, ours for the released checkpoints among them, choose their own backend.
    stock = isinstance(processor, ProcessorMixin) and type(processor).__module__.startswith("transformers.")
    if stock and hasattr(processor, "image_processor"):
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")


def set_prompt(
    transformer: Transformer, template: str, image_tokens: ImageTokens | None, *, listwise: bool = True
) -> None:
    """Set the template of a model and its image limits (None: the template's), so that they are saved with it.

    Raises:
        ValueError: If the template drops a part of its input.
    """
    text = load_template(template)
    check_template(transformer.processor, text)
    if listwise:
        check_template(transformer.processor, text, listwise=True)
    transformer.processor.chat_template = text
    if transformer.tokenizer is not None and transformer.tokenizer is not transformer.processor:
        transformer.tokenizer.chat_template = None  # one template in the folder, not two that may disagree
    limits = image_size_limits(
        transformer.processor, image_tokens or default_image_tokens(transformer.processor, template)
    )
    if limits is not None:
        image = {**transformer.processing_kwargs.get("image", {}), "size": limits}
        transformer.processing_kwargs = {**transformer.processing_kwargs, "image": image}


def generative_modules(
    folder: str,
    *,
    template: str | None = None,
    image_tokens: ImageTokens | None = None,
    listwise: bool = True,
    model_kwargs: Mapping[str, object] | None = None,
    processor_kwargs: Mapping[str, object] | None = None,
    config_kwargs: Mapping[str, object] | None = None,
) -> list[nn.Module]:
    """Build the modules ``[Transformer, LogitScore(Yes, No)]`` from a bare generative vision-language checkpoint.

    Args:
        folder: Folder or hub repository in the layout of transformers, for example of UniME-V2-reranker-Qwen25VL-7B.
        template: See :func:`~unime_st.judging.load_template`. Defaults to :func:`default_template`.
        image_tokens: Minimum and maximum number of visual tokens per image. Defaults to those of the template: 4 to
            300 for "official", else the processor's own.
        listwise: Whether the template must also render lists, as a reranker needs.
        model_kwargs: Passed to the model's ``from_pretrained``, for example ``{"dtype": "bfloat16"}``.
        processor_kwargs: Passed to the processor's ``from_pretrained``.
        config_kwargs: Passed to the config's ``from_pretrained``.

    Raises:
        ValueError: If the checkpoint has no language-model head, the tokenizer no single tokens "Yes" and "No", or the
            template drops a part of its input.
    """
    template = template or default_template(folder)
    try:
        transformer = Transformer(
            folder,
            transformer_task="any-to-any",
            unpad_inputs=False,
            model_kwargs=dict(model_kwargs or {}),
            # Passed here, so that the module finds that the model takes messages even if it came without a template.
            processor_kwargs={**(processor_kwargs or {}), "chat_template": load_template(template)},
            config_kwargs=dict(config_kwargs or {}),
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        # transformers goes on with the names of all its models.
        kind = (
            "an embedding model" if load_file_path(folder, "modules.json") else "a model without a language-model head"
        )
        raise ValueError(
            f"{folder} holds {kind}, which cannot answer Yes or No: expected a saved reranker or a generative "
            "vision-language model, such as the one it came from."
        ) from error
    architectures = transformer.config.architectures or []
    tied = getattr(transformer.config.get_text_config(), "tie_word_embeddings", False)
    # from_pretrained would fill a missing head with random numbers and only log it.
    if not tied and not any(name.endswith(("ForConditionalGeneration", "ForCausalLM")) for name in architectures):
        raise ValueError(
            f"{folder} holds {architectures or 'an unnamed architecture'} without a language-model head (an embedding "
            "model drops it when saved), so it cannot answer Yes or No. Load the generative checkpoint it came from."
        )
    use_pillow(transformer, folder)
    use_fast_modules(transformer)
    resize_frames(transformer.processor)
    set_prompt(transformer, template, image_tokens, listwise=listwise)
    return [transformer, LogitScore(*answer_token_ids(transformer.tokenizer))]


def load_cross_encoder(
    name: str | Path, *, template: str | None = None, image_tokens: ImageTokens | None = None, **kwargs: Any
) -> CrossEncoder:
    """Load a saved reranker, or any generative vision-language checkpoint, as a judge of pairs.

    ``template`` and ``image_tokens`` are those of :func:`generative_modules`; a saved reranker keeps its own unless
    they are given. ``kwargs`` go to ``CrossEncoder``. The model has one score per pair, the log-odds of Yes against
    No.

    Example:
        >>> from unime_st.scoring.loading import load_cross_encoder
        >>> load_cross_encoder("unime-tiny", template="tiny").num_labels
        1
    """
    folder = resolve_name(name)
    if not is_cross_encoder(folder):
        parts = ("model_kwargs", "processor_kwargs", "config_kwargs")
        own: dict[str, Any] = {key: kwargs.pop(key) for key in parts if key in kwargs}
        own |= {"template": template, "image_tokens": image_tokens}
        return CrossEncoder(modules=generative_modules(folder, listwise=False, **own), num_labels=1, **kwargs)
    model = CrossEncoder(folder, **kwargs)
    prepare_saved(model, folder, template, image_tokens, listwise=False)
    return model


def prepare_saved(
    model: CrossEncoder,
    folder: str,
    template: str | None,
    image_tokens: ImageTokens | None = None,
    *,
    listwise: bool = True,
) -> None:
    """Set the image backend of a saved reranker and, where given, another template or other image limits, in place."""
    if not isinstance(model[0], Transformer):
        return
    use_pillow(model[0], folder)
    use_fast_modules(model)
    resize_frames(model[0].processor)
    if template is not None or image_tokens is not None:
        set_prompt(model[0], template or model[0].processor.chat_template, image_tokens, listwise=listwise)


def generative_parts(model: CrossEncoder) -> tuple[Transformer, list[int]]:
    """Input module of a generative ``CrossEncoder`` (``[Transformer, LogitScore]``), and the ids of Yes and No.

    Raises:
        ValueError: If the model is of another kind or has no chat template.

    Example:
        >>> from unime_st.scoring.loading import generative_parts, load_cross_encoder
        >>> len(generative_parts(load_cross_encoder("unime-tiny", template="tiny"))[1])
        2
    """
    first, last = model[0], model[-1]
    if not isinstance(first, Transformer) or not isinstance(last, LogitScore) or last.false_token_id is None:
        raise ValueError(
            "expected a generative CrossEncoder, [Transformer, LogitScore(yes, no)], got "
            f"[{', '.join(type(module).__name__ for module in model)}]. Load one with UniMEReranker(folder)."
        )
    if first.processor.chat_template is None:
        raise ValueError("this CrossEncoder has no chat template: pass template='official' to UniMEReranker(folder)")
    return first, [last.true_token_id, last.false_token_id]
