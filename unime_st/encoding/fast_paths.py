"""Common parts of the fast paths for texts and images: when one applies, its memory, padding."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

FastPath = TypeVar("FastPath")

_REMEMBERED: WeakKeyDictionary[object, dict[Hashable, Any]] = WeakKeyDictionary()


def remembered(kind: Callable[..., FastPath], model: SentenceTransformer, prompting: Mapping[str, Any]) -> FastPath:
    """Fast path of a model, probed once for every prompt, template and length limit."""
    first: Any = model[0]
    if not isinstance(first, Transformer):  # such as a StaticEmbedding: nothing is probed
        return kind(model, **prompting)
    state = (prompting, first.processing_kwargs, model.max_seq_length, model.tokenizer.padding_side)
    template = getattr(model.processor, "chat_template", None)
    key = (kind, repr(state), str(template), id(getattr(model.processor, "image_processor", None)))
    kept = _REMEMBERED.setdefault(first.model, {})
    if key not in kept:
        kept[key] = kind(model, **prompting)
    found: FastPath = kept[key]
    return found


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


def reserved_tokens(model: SentenceTransformer) -> re.Pattern[str]:
    """Pattern of the special tokens that a text must not contain for a fast path."""
    names = {token.content for token in model.tokenizer.added_tokens_decoder.values() if token.special}
    images = (getattr(model.processor, name, None) for name in ("image_token", "video_token"))
    names |= {"<|image_", *(name for name in images if name)}
    return re.compile("|".join(map(re.escape, sorted(names))))


def uses_chat_template(model: SentenceTransformer, options: Mapping[str, object]) -> bool:
    """Whether texts go through a chat template, and no option changes their truncation."""
    first: Any = model[0]
    if not isinstance(first, Transformer) or "message" not in first.modality_config or set(options) - {"task"}:
        return False
    return "task" not in options or (first.query_length is None and first.document_length is None)
