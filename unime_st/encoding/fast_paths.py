"""Fast paths without the chat template machinery: what those for texts and for images share."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from unime_st.memory import malloc_trim

NO_LIMIT = 10**9
"""Maximum length in tokens of a model that has none."""

FastPath = TypeVar("FastPath")

_REMEMBERED: WeakKeyDictionary[object, dict[Hashable, Any]] = WeakKeyDictionary()


def remembered(kind: Callable[..., FastPath], model: SentenceTransformer, prompting: Mapping[str, Any]) -> FastPath:
    """Fast path of a model, probed once for every prompt, tokenizer, template and length limit."""
    first: Any = model[0]
    if not isinstance(first, Transformer):  # such as a StaticEmbedding: nothing is probed
        return kind(model, **prompting)
    state = (prompting, first.processing_kwargs, model.max_seq_length, model.tokenizer.padding_side)
    template = getattr(model.processor, "chat_template", None)
    # The engine's copies of a model have tokenizers of their own, which share their backend.
    parts = (getattr(model.tokenizer, "backend_tokenizer", None), getattr(model.processor, "image_processor", None))
    key = (kind, repr(state), str(template), *map(id, parts), str(parts[1]))  # values of pixels depend on its options
    kept = _REMEMBERED.setdefault(first.model, {})
    if key not in kept:
        kept[key] = kind(model, **prompting)
        malloc_trim()  # memory of the probes, among them a large image
    found: FastPath = kept[key]
    return found


def uses_chat_template(model: SentenceTransformer, options: Mapping[str, object]) -> bool:
    """Whether texts go through a chat template, and no option changes their truncation."""
    first: Any = model[0]
    if not isinstance(first, Transformer) or "message" not in first.modality_config or set(options) - {"task"}:
        return False
    return "task" not in options or (first.query_length is None and first.document_length is None)


def template_renderer(model: SentenceTransformer, prompt: str | None) -> Callable[[Mapping[str, object]], str]:
    """Function that renders an input of text and image with the chat template and the prompt, to one text."""
    transformer: Any = model[0]
    formatter = transformer.input_formatter
    options = dict((transformer.processing_kwargs or {}).get("chat_template") or {})
    options.pop("restore_suffix", None)

    def render(parts: Mapping[str, object]) -> str:
        chat = [formatter.to_message(parts)]
        chat = formatter.prepend_prompt_to_messages(chat, prompt) if prompt else chat
        return str(transformer.processor.apply_chat_template(chat[0], tokenize=False, **options))

    return render


def reserved_tokens(model: SentenceTransformer) -> re.Pattern[str]:
    """Pattern of the special tokens that a text must not contain for a fast path."""
    names = {token.content for token in model.tokenizer.added_tokens_decoder.values() if token.special}
    media = (getattr(model.processor, name, None) for name in ("image_token", "video_token"))
    names |= {"<|image_", *(name for name in media if name)}  # Phi-3.5-V numbers its images: <|image_1|>
    return re.compile("|".join(map(re.escape, sorted(names))))


def max_length(model: SentenceTransformer) -> int:
    """Number of tokens from which on the model may truncate."""
    return int(min(model.max_seq_length or NO_LIMIT, NO_LIMIT))


def tokenize(prompts: Sequence[str | None], tokenizer: Any, *, special: bool) -> list[np.ndarray | None]:
    """Token ids of rendered prompts, with the special tokens that the tokenizer adds or without; None stays None."""
    known = [prompt for prompt in prompts if prompt is not None]
    if not known:
        return [None] * len(prompts)
    found = iter(tokenizer(known, add_special_tokens=special, return_attention_mask=False)["input_ids"])
    return [None if prompt is None else np.asarray(next(found), dtype=np.int64) for prompt in prompts]


def pad_rows(rows: Sequence[np.ndarray], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pad token ids to one length on the side of the tokenizer; returns ids and attention mask."""
    width = max(map(len, rows))
    ids = np.full((len(rows), width), tokenizer.pad_token_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for number, row in enumerate(rows):
        index = slice(width - len(row), None) if tokenizer.padding_side == "left" else slice(len(row))
        ids[number, index] = row
        mask[number, index] = 1
    return ids, mask
