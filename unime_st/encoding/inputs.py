"""What an input holds, without decoding its pictures."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers.base.modality import is_image_url_or_path

from unime_st.data.images import BadImageError
from unime_st.data.items import Item

_UNKNOWN_SIZE = (512, 512)
"""What a picture counts for that has to be fetched first."""


def texts_and_sizes(value: Any) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the texts of an input and the sizes of its pictures, from their headers alone.

    Args:
        value: An :class:`~unime_st.Item`, or whatever ``SentenceTransformer.encode`` takes: text, image (PIL, path,
            URL, data URI, array), ``{"image": ..., "text": ...}`` with single values or lists, chat.

    Returns:
        tuple: Texts, and (width, height) of every picture that can be opened.

    Example:
        >>> from PIL import Image
        >>> from unime_st.encoding.inputs import texts_and_sizes
        >>> texts_and_sizes({"text": "a ship", "image": [Image.new("RGB", (4, 2))] * 2})
        (['a ship'], [(4, 2), (4, 2)])
    """
    texts: list[str] = []
    sizes: list[tuple[int, int]] = []
    _collect(value, None, texts, sizes)
    return texts, sizes


def _collect(value: Any, kind: str | None, texts: list[str], sizes: list[tuple[int, int]]) -> None:
    if isinstance(value, str):
        if kind == "image" or (kind is None and is_image_url_or_path(value)):
            sizes += _size_of_source(value)
        else:
            texts.append(value)
    elif isinstance(value, Item):
        texts += [value.text] if value.text is not None else []
        if value.image is not None:
            _collect(value.image, "image", texts, sizes)
    elif isinstance(value, dict):
        for name, part in value.items():
            if name in ("text", "image", "content"):
                _collect(part, "text" if name == "content" and isinstance(part, str) else name, texts, sizes)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _collect(part, kind if kind in ("text", "image") else None, texts, sizes)
    else:
        sizes += _size_of_picture(value)


def _size_of_picture(value: Any) -> list[tuple[int, int]]:
    if isinstance(value, Image.Image):
        return [value.size]
    if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 3:
        height, width = value.shape[:2] if value.shape[-1] in (1, 3, 4) else value.shape[-2:]
        return [(int(width), int(height))]
    if hasattr(value, "size") and callable(value.size):  # an ImageRef
        try:
            return [value.size()]
        except BadImageError:  # reported when it is decoded
            return []
    return []


def _size_of_source(source: str) -> list[tuple[int, int]]:
    if source.startswith(("http://", "https://")):
        return [_UNKNOWN_SIZE]
    try:
        encoded = io.BytesIO(base64.b64decode(source.split(",", 1)[1])) if source.startswith("data:") else source
        with Image.open(encoded) as image:
            return [image.size]
    except (OSError, ValueError, SyntaxError, IndexError, binascii.Error, Image.DecompressionBombError):
        return []  # reported when it is decoded
