"""Fast path for plain texts: tokenizes a whole window of texts at once, without the chat template machinery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from unime_st.data.items import Item
from unime_st.encoding.fast_paths import pad_rows, reserved_tokens, uses_chat_template
from unime_st.encoding.model_inputs import Features, is_media
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
        transformer: Any = model[0]
        formatter = transformer.input_formatter
        options = dict((transformer.processing_kwargs or {}).get("chat_template") or {})
        options.pop("restore_suffix", None)

        def render(texts: Sequence[str]) -> str:
            chat = [formatter.to_message({"text": texts[0]})]
            chat = formatter.prepend_prompt_to_messages(chat, prompt) if prompt else chat
            return str(transformer.processor.apply_chat_template(chat[0], tokenize=False, **options))

        self._frame = TemplateFrame.find(render)
        return self._frame is not None

    def _same_as(self, model: SentenceTransformer, prompt: str | None, options: Mapping[str, object]) -> bool:
        """Whether the features of a batch equal those of the model."""
        limit = model.max_seq_length
        self._limit = int(min(limit if limit else 10**9, 10**9))
        self._reserved = reserved_tokens(model)
        expected = model.preprocess(list(SAMPLES), prompt=prompt, **options)
        self._names = [name for name in expected if name not in ("input_ids", "attention_mask")]
        if set(self._names) - {"mm_token_type_ids", "token_type_ids", "modality"}:
            return False
        self._modality = expected.get("modality")
        for self._special in (False, True):
            rows = [row for row in self.tokens(list(SAMPLES)) if row is not None]
            if len(rows) < len(SAMPLES):  # the maximum length leaves no room for them
                continue
            made = self.features(rows)
            if all(
                torch.equal(value, made[name]) if torch.is_tensor(value) else value == made[name]
                for name, value in expected.items()
            ):
                return True
        return False

    def tokens(self, texts: list[str]) -> list[np.ndarray | None]:
        """Tokenize texts in the frame of the template, as int64 token ids.

        None stands for a text that needs the processor because it would be truncated or contains a special token.
        """
        assert self._frame is not None
        plain = [None if self._reserved.search(text) else self._frame.join([text]) for text in texts]
        framed = [text for text in plain if text is not None]
        if not framed:
            return [None] * len(texts)
        found = iter(
            self._tokenizer(framed, add_special_tokens=self._special, return_attention_mask=False)["input_ids"]
        )
        rows = [None if text is None else np.asarray(next(found), dtype=np.int64) for text in plain]
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
