"""Model inputs: texts, image sizes and content keys of an input, without decoding its images."""

from __future__ import annotations

import base64
import io
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers.base.modality import (
    is_audio_url_or_path,
    is_image_url_or_path,
    is_message_dict,
    is_video_url_or_path,
)

from unime_st.data.images import MAX_PIXELS, BadImageError
from unime_st.data.items import Item
from unime_st.encoding.image_urls import fetch_image
from unime_st.files import digest

_UNKNOWN_SIZE = (512, 512)
"""Assumed (width, height) of an image behind a URL."""


def texts_and_sizes(value: Any) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the texts of an input and the sizes of its images, from their headers alone.

    Args:
        value: An :class:`~unime_st.Item`, or any input of ``SentenceTransformer.encode``: text, image (PIL, path, URL,
            data URI, array), ``{"image": ..., "text": ...}`` with single values or lists, chat.

    Returns:
        tuple[list[str], list[tuple[int, int]]]: Texts, and (width, height) of every image that can be opened.

    Example:
        >>> from PIL import Image
        >>> from unime_st.encoding.model_inputs import texts_and_sizes
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
        sizes += _size_of_image(value)


def _size_of_image(value: Any) -> list[tuple[int, int]]:
    if isinstance(value, Image.Image):
        return [value.size]
    if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 3:
        height, width = value.shape[:2] if value.shape[-1] in (1, 3, 4) else value.shape[-2:]
        return [(int(width), int(height))]
    if hasattr(value, "size") and callable(value.size):  # an ImageRef
        try:
            return [value.size()]
        except BadImageError:  # reported on decoding
            return []
    return []


def _size_of_source(source: str) -> list[tuple[int, int]]:
    if source.startswith(("http://", "https://")):
        return [_UNKNOWN_SIZE]
    try:
        with Image.open(_opened(source)) as image:
            return [image.size]
    except (OSError, ValueError, SyntaxError, IndexError, Image.DecompressionBombError):
        return []  # reported on decoding


def _opened(source: str) -> str | io.BytesIO:
    """Argument for ``Image.open``: the path, or the bytes of a data URI."""
    return io.BytesIO(base64.b64decode(source.split(",", 1)[1])) if source.startswith("data:") else source


def content_key(value: Any) -> Hashable:
    """Return a key that is equal for two inputs exactly if their contents are equal.

    Args:
        value: As for :func:`texts_and_sizes`. Image files are identified by path, other images by their pixels. A value
            of an unknown type equals no other.

    Returns:
        Hashable: A key that keeps no image in memory.

    Raises:
        BadImageError: If the image of an :class:`~unime_st.Item` cannot be read.

    Example:
        >>> from PIL import Image
        >>> from unime_st.encoding.model_inputs import content_key
        >>> content_key(Image.new("RGB", (2, 2))) == content_key(Image.new("RGB", (2, 2)))
        True
    """
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, Item):
        return bytes.fromhex(value.id)
    if isinstance(value, dict):
        return ("dict", *((name, content_key(part)) for name, part in value.items()))  # the order matters to templates
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(content_key, value))
    if isinstance(value, Image.Image):
        if getattr(value, "fp", None) is not None and getattr(value, "filename", None):  # not read yet
            return "file", str(value.filename), value.tell()  # type: ignore[attr-defined]
        palette = value.getpalette() if value.mode == "P" else None
        return (
            "pixels",
            value.mode,
            value.size,
            _digest(value.tobytes()),
            _digest(repr((palette, value.info)).encode()),
        )
    if isinstance(value, np.ndarray) and value.dtype != object:
        return "array", value.shape, value.dtype.str, _digest(np.ascontiguousarray(value).tobytes())
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        return (
            "tensor",
            tuple(plain.shape),
            str(plain.dtype),
            _digest(plain.view(-1).view(torch.uint8).numpy().tobytes()),
        )
    return object()


def load_input(value: Any) -> Any:
    """Load the images of an input: items are decoded, URLs are downloaded, oversized images are refused.

    Args:
        value: As for :func:`texts_and_sizes`.

    Returns:
        Any: An input of ``SentenceTransformer.preprocess``.

    Raises:
        BadImageError: If an image cannot be read, downloaded or decoded.
    """
    return value.to_input() if isinstance(value, Item) else _load_part(value, None)


def _load_part(value: Any, kind: str | None) -> Any:
    if isinstance(value, str):
        url = value.startswith(("http://", "https://")) and (
            kind == "image" or (kind is None and is_image_url_or_path(value))
        )
        if url:
            return fetch_image(value)
        if kind == "image" or (kind is None and is_image_url_or_path(value)):
            _check_pixels(value)
        return value
    if isinstance(value, dict):
        known = {name: name for name in ("text", "image")}
        return {
            name: part if name == "content" and isinstance(part, str) else _load_part(part, known.get(name, "other"))
            for name, part in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(_load_part(part, kind if kind in ("text", "image") else None) for part in value)
    return value


def _check_pixels(source: str) -> None:
    """Raise for an image with too many pixels. Other errors are left to the processor."""
    label = source if len(source) <= 200 else source[:60] + "..."
    try:
        with Image.open(_opened(source)) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise BadImageError(f"image {label}: {error}") from error
    except (OSError, ValueError, SyntaxError, IndexError):
        return
    if width * height > MAX_PIXELS:
        raise BadImageError(f"image {label}: {width} x {height} is more than {MAX_PIXELS} pixels; resize it")


def _digest(content: bytes) -> bytes:
    return bytes.fromhex(digest(content))


def is_media(text: str) -> bool:
    """Whether Sentence Transformers treats a string as the path or URL of an image, video or audio."""
    return is_image_url_or_path(text) or is_video_url_or_path(text) or is_audio_url_or_path(text)


def is_chat(value: Any) -> bool:
    """Whether an input is a chat: a message or a list of messages."""
    return is_message_dict(value[0] if isinstance(value, (list, tuple)) and value else value)


def raise_if_single(inputs: Any) -> None:
    """Raise an error for a single input, whose letters or keys would be taken for a list of texts.

    Args:
        inputs: The argument that must be a list or an iterator.

    Raises:
        TypeError: If it is a text, bytes, a dict, an item or an image.
    """
    if isinstance(inputs, (str, bytes, dict, Item, Image.Image)):
        raise TypeError(
            f"expected a list or an iterator of inputs, got a single {type(inputs).__name__}; put it in a list"
        )
