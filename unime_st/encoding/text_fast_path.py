"""Fast path for plain texts: tokenizes a whole window of texts at once, without the chat template machinery."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from unime_st.data.items import Item
from unime_st.encoding.fast_paths import (
    max_length,
    pad_rows,
    reserved_tokens,
    template_renderer,
    tokenize,
    uses_chat_template,
)
from unime_st.encoding.model_inputs import Features, is_media, same_features
from unime_st.recipes.template_frame import SAMPLES, TemplateFrame


class TextFastPath:
    """Computes the features of ``model.preprocess`` for plain texts by tokenization alone.

    Most chat templates put a text between a fixed head and tail. Probe texts show whether this template does, with the
    same tokens; if not, :attr:`usable` is False.

    Example:
        >>> from unime_st import UniME
        >>> from unime_st.encoding.text_fast_path import TextFastPath
        >>> path = TextFastPath(UniME("unime-tiny"))
        >>> path.usable, len(path.tokens(["a red circle"])[0])
        (True, 5)
    """

    def __init__(self, model: SentenceTransformer, prompt: str | None = None, **options: Any) -> None:
        self._tokenizer = model.tokenizer
        self._special = False
        self._frame: TemplateFrame | None = None
        self.usable = (
            uses_chat_template(model, options)
            and self._find_frame(model, prompt)
            and self._same_as(model, prompt, options)
        )

    def _find_frame(self, model: SentenceTransformer, prompt: str | None) -> bool:
        """Find the frame that the template puts around a text."""
        render = template_renderer(model, prompt)
        self._frame = TemplateFrame.find(lambda texts: render({"text": texts[0]}))
        return self._frame is not None

    def _same_as(self, model: SentenceTransformer, prompt: str | None, options: Mapping[str, object]) -> bool:
        """Take from a batch of the model which features it has; whether those made here equal them."""
        self._limit, self._reserved = max_length(model), reserved_tokens(model)
        expected = model.preprocess(list(SAMPLES), prompt=prompt, **options)
        self._names = [name for name in expected if name not in ("input_ids", "attention_mask")]
        if set(self._names) - {"mm_token_type_ids", "token_type_ids", "modality"}:
            return False
        self._modality = expected.get("modality")
        for special in (False, True):
            self._special = special
            rows = [row for row in self.tokens(list(SAMPLES)) if row is not None]
            if len(rows) < len(SAMPLES):  # the maximum length leaves no room for them
                continue
            if same_features(self.features(rows), expected):
                return True
        return False

    def tokens(self, texts: list[str]) -> list[np.ndarray | None]:
        """Tokenize texts in the frame of the template, as int64 token ids.

        None stands for a text that needs the processor because it would be truncated or contains a special token.
        """
        assert self._frame is not None
        prompts = [None if self._reserved.search(text) else self._frame.join([text]) for text in texts]
        rows = tokenize(prompts, self._tokenizer, special=self._special)
        return [None if row is None or len(row) >= self._limit else row for row in rows]

    def features(self, rows: list[np.ndarray]) -> Features:
        """Pad token ids from :meth:`tokens` to the features that ``model.preprocess`` computes for these texts."""
        ids, mask = pad_rows(rows, self._tokenizer)
        features: Features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        for name in self._names:
            features[name] = self._modality if name == "modality" else torch.zeros(ids.shape, dtype=torch.long)
        return features


def plain_text(value: object) -> str | None:
    """Text of a normalized input that consists of a text only, else None."""
    if isinstance(value, Item):
        return value.text if value.image is None and value.video is None else None
    if isinstance(value, dict) and value.keys() == {"text"} and isinstance(value["text"], str):
        return value["text"]
    return value if isinstance(value, str) and not is_media(value) else None
