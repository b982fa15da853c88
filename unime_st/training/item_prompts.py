"""Prompts of queries and documents in training: both sides get the inputs of ``encode_query`` and ``encode_document``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sentence_transformers import SentenceTransformer

from unime_st.data.records import ItemFolder
from unime_st.retrieval.index_settings import declared_prompts
from unime_st.training.item_tokens import UNREADABLE

PromptOptions = dict[str, str | None]
"""Options of ``model.preprocess``: prompt and task."""


class ItemPrompts:
    """Positions of stored items on each side of training: an item with another prompt is another input.

    Position ``side * len(records.items) + p`` is item ``p`` on that side. Side 0 has no prompt, and sides with equal
    features are one. An item whose text begins with the prompt of its side carries it already, and is on side 0.

    Args:
        records: Record folder of the items.
        model: The model that is trained; its prompts are those of ``encode_query`` and ``encode_document``.

    Attributes:
        options: Options of ``model.preprocess`` for each side.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from unime_st import Item, UniME
        >>> from unime_st.data import PairRecord, RecordSet
        >>> from unime_st.training.item_prompts import ItemPrompts
        >>> pairs = [PairRecord(Item(text), Item("a red square")) for text in ("red", "Find: red")]
        >>> records, model = RecordSet.write(tempfile.mkdtemp(), pairs, {}), UniME("unime-tiny")
        >>> model.prompts["query"] = "Find: "
        >>> prompts = ItemPrompts(records, model)
        >>> prompts.options
        [{}, {'prompt': 'Find: ', 'task': 'query'}]
        >>> prompts.positions(["query", "positive"], np.array([[0, 1], [2, 1]])).tolist()
        [[3, 1], [2, 1]]
    """

    def __init__(self, records: ItemFolder, model: SentenceTransformer) -> None:
        self._count = len(records.items)
        self.options: list[PromptOptions] = [{}]
        self._tokens = [_tokens(model)]
        document, query = declared_prompts(model)
        self._query = self._sides(records, model, prompt=query, task="query")
        self._document = self._sides(records, model, prompt=document, task="document")

    def _sides(self, records: ItemFolder, model: SentenceTransformer, **options: str | None) -> np.ndarray:
        """Side of each stored item with these options, of shape (items,)."""
        tokens, prompt = _tokens(model, **options), (options["prompt"] or "").strip()
        if tokens not in self._tokens:
            self._tokens.append(tokens)
            self.options.append(options)
        sides = np.full(self._count, self._tokens.index(tokens))
        if prompt:
            sides[[(text or "").lstrip().startswith(prompt) for text in records.items.texts]] = 0
        return sides

    def positions(self, columns: Sequence[str], stored: np.ndarray) -> np.ndarray:
        """Positions on their sides of the items of rows; ``stored`` and the result have the shape (rows, columns)."""
        sides = [self._query if name == "query" else self._document for name in columns]
        return np.stack([row + self._count * side[row] for row, side in zip(stored.T, sides, strict=True)], axis=1)

    def costs(self, tokens: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and pixels of the items on all sides, of shape (sides * items,), from those without prompt."""
        added = [len(side) - len(self._tokens[0]) for side in self._tokens]
        of_sides = [np.where(tokens == UNREADABLE, UNREADABLE, tokens + more) for more in added]
        return np.concatenate(of_sides), np.tile(pixels, len(added))


def _tokens(model: SentenceTransformer, **options: str | None) -> list[int]:
    tokens: list[int] = model.preprocess(["0"], **options)["input_ids"][0].tolist()
    return tokens
