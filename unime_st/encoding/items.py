"""Items in, vectors out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from unime_st.data.images import BadImageError
from unime_st.data.items import Item

_PIXELS_PER_TOKEN = 28 * 28
_CHARACTERS_PER_TOKEN = 4


@overload
def encode_items(
    model: SentenceTransformer,
    items: Sequence[Item],
    *,
    batch_size: int = ...,
    show_progress_bar: bool = ...,
    on_error: Literal["raise"] = ...,
) -> np.ndarray: ...


@overload
def encode_items(
    model: SentenceTransformer,
    items: Sequence[Item],
    *,
    batch_size: int = ...,
    show_progress_bar: bool = ...,
    on_error: Literal["skip"],
) -> tuple[np.ndarray, np.ndarray]: ...


def encode_items(
    model: SentenceTransformer,
    items: Sequence[Item],
    *,
    batch_size: int = 64,
    show_progress_bar: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Embed items; equal items are embedded once, and pixels exist only for the batch at hand.

    Args:
        model: Any Sentence Transformers model that takes the modalities at hand.
        items: Items, or any sequence that gives them lazily, such as the items of a record set.
        batch_size: Items per forward pass; items of like modality and size share a batch. Defaults to 64.
        show_progress_bar: Show progress over distinct items. Defaults to False.
        on_error: "raise" (default) stops at the first unreadable image; "skip" leaves its row NaN and says so in the
            returned mask.

    Returns:
        np.ndarray: float32 of shape (len(items), dim), as the model gives them (UniME models: unit length). With
        ``on_error="skip"`` a tuple of it and a boolean mask of shape (len(items),), True where there is a vector.

    Raises:
        BadImageError: If an image cannot be decoded and ``on_error`` is "raise"; the message names the item.

    Example:
        ::

            from sentence_transformers import SentenceTransformer
            from unime_st import Item
            from unime_st.encoding import encode_items

            model = SentenceTransformer("unime-tiny")
            vectors = encode_items(model, [Item("a red square"), Item("a blue circle")])
            print(vectors @ vectors.T)
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    distinct, rows = _distinct(items, on_error)
    vectors: np.ndarray | None = None
    done = np.zeros(len(distinct) + 1, dtype=bool)  # the last place stands for items without an id
    order = sorted(range(len(distinct)), key=lambda row: _cost(items[distinct[row]]), reverse=True)
    with tqdm(total=len(distinct), desc="encoding", unit="item", disable=not show_progress_bar) as progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            good, inputs = _decode(items, [distinct[row] for row in batch], on_error)
            if inputs:
                rows_done = [batch[place] for place in good]
                found = model.encode(inputs, batch_size=len(inputs), show_progress_bar=False)
                if vectors is None:
                    vectors = np.empty((len(distinct), found.shape[1]), dtype=np.float32)
                vectors[rows_done] = found
                done[rows_done] = True
            progress.update(len(batch))
    mask = done[rows]
    width = vectors.shape[1] if vectors is not None else model.get_embedding_dimension() or 0
    result = np.full((len(rows), width), np.nan, dtype=np.float32)
    if vectors is not None:
        result[mask] = vectors[rows[mask]]
    return result if on_error == "raise" else (result, mask)


def _distinct(items: Sequence[Item], on_error: str) -> tuple[list[int], np.ndarray]:
    """Positions of the first of each distinct item, and for every item its place among them (-1: unreadable)."""
    first: dict[str, int] = {}
    distinct: list[int] = []
    rows = np.full(len(items), -1, dtype=np.int64)
    for index, item in enumerate(items):
        try:
            key = item.id
        except BadImageError as error:
            if on_error == "raise":
                raise BadImageError(f"item {index}: {error}") from error
            continue
        if key not in first:
            first[key] = len(distinct)
            distinct.append(index)
        rows[index] = first[key]
    return distinct, rows


def _cost(item: Item) -> tuple[str, float]:
    """Modality, then an estimate of tokens from the text length and the image header."""
    tokens = len(item.text or "") / _CHARACTERS_PER_TOKEN
    if item.image is not None:
        try:
            width, height = item.image.size()
        except BadImageError:  # reported when it is decoded
            width = height = 0
        tokens += width * height / _PIXELS_PER_TOKEN
    return item.modality, tokens


def _decode(items: Sequence[Item], indices: list[int], on_error: str) -> tuple[list[int], list[dict[str, Any]]]:
    good, inputs = [], []
    for place, index in enumerate(indices):
        try:
            inputs.append(items[index].to_input())
        except BadImageError as error:
            if on_error == "raise":
                raise BadImageError(f"item {index}: {error}") from error
            continue
        good.append(place)
    return good, inputs
