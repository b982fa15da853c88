"""Input parsing of the reranker: texts, images, videos, paths, URLs and dicts become items."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from PIL import Image
from sentence_transformers.base.modality import is_image_url_or_path

from unime_st.data import BadImageError, ImageRef, Item, VideoRef
from unime_st.data.image_urls import fetch_bytes
from unime_st.data.images import decoding, label_of, padded_to_aspect, to_rgb
from unime_st.encoding.model_inputs import normalize_input, raise_if_single
from unime_st.scoring.prompts import as_item

_LONGEST_PATH = 4096


class _BlankText(Item):
    """A text without a visible character: it cannot be stored or embedded, but a prompt can show it."""

    __slots__ = ()

    def __init__(self, text: str) -> None:
        self._text, self._image, self._video, self._id = text, None, None, None


def to_item(value: Any) -> Item:
    """Turn an input of ``rank`` into an item; a text that is the URL or the existing path of an image is that image.

    Args:
        value: Item, text (also an empty one), Pillow image or dict of them. The image of a dict may also be a path,
            a URL (fetched here), encoded bytes, an array of 8-bit RGB, RGBA or gray pixels, or a list of one of these.

    Raises:
        BadImageError: If an image in memory cannot be decoded or a URL not be fetched. Files are read when used.
        TypeError: If the value is of another type.
        ValueError: If the value holds neither a text nor an image.

    Example:
        >>> from unime_st.reranking.parsing import to_item
        >>> to_item("a red square").modality
        'text'
    """
    if isinstance(value, str) and is_image_url_or_path(value) and (_is_url(value) or os.path.isfile(value)):
        value = {"image": value}
    if isinstance(value, (str, Image.Image)):
        value = {"text" if isinstance(value, str) else "image": value}
    if not isinstance(value, dict):
        return as_item(value)
    value = normalize_input(value) if value else value
    if value.get("image") is not None:
        return as_item({**value, "image": _image(value["image"])})
    text = value.get("text")
    if isinstance(text, str) and not text.strip() and value.keys() <= {"text", "image"}:
        return _BlankText(text)
    return as_item(value)


class ParsedInputs(NamedTuple):
    """Inputs as items, and the errors of those that are none.

    An error is a :class:`BadImageError` for an image that cannot be read, or another one for an unsupported input.
    """

    items: list[Item | None]
    errors: list[Exception | None]

    def raise_for_invalid(self, names: Sequence[str]) -> None:
        """Raise the error of the first unsupported or empty input, with its name; unreadable images pass."""
        for name, error in zip(names, self.errors, strict=True):
            if error is not None and not isinstance(error, BadImageError):
                raise (ValueError if isinstance(error, ValueError) else TypeError)(f"{name}: {error}")


def parse_inputs(values: Sequence[object]) -> ParsedInputs:
    """Turn each input into an item, see :func:`to_item`, or the error that prevents it.

    Example:
        >>> from unime_st.reranking.parsing import parse_inputs
        >>> items, errors = parse_inputs(["a red square", 3])
        >>> items[0].text, type(errors[1]).__name__
        ('a red square', 'TypeError')
    """
    parsed = ParsedInputs([], [])
    for value in values:
        item: Item | None = None
        error: Exception | None = None
        try:
            item = to_item(value)
        except (TypeError, ValueError, AttributeError) as found:
            error = found
        parsed.items.append(item)
        parsed.errors.append(error)
    return parsed


def listed(inputs: Iterable[object]) -> Any:
    """Inputs as a list, which may come as an iterator, a Series or an Arrow array; TypeError for a single one."""
    raise_if_single(inputs)
    if isinstance(inputs, (list, tuple)):
        return inputs
    convert = getattr(inputs, "to_pylist", None) or getattr(inputs, "tolist", None)  # Arrow; numpy and pandas
    return list(inputs) if convert is None else convert()


def image_error(item: Item) -> BadImageError | None:
    """Decode the image and the video of an item, if it has them, and return the error that this raises, if any.

    Example:
        >>> from unime_st import Item
        >>> from unime_st.reranking.parsing import image_error
        >>> type(image_error(Item(image=b"not an image"))).__name__
        'BadImageError'
    """
    try:
        if item.image is not None:
            item.image.open()
        if item.video is not None:
            item.video.check()
    except BadImageError as error:
        return error
    return None


def is_pair(row: object) -> TypeGuard[Sequence[object]]:
    """Tell a pair of inputs from a chat, which is a list of dicts with roles."""
    return isinstance(row, (tuple, list)) and not (row and isinstance(row[0], dict) and "role" in row[0])


def plain_input(value: object, opened: dict[object, Any]) -> Any:
    """Turn one side of a pair into what sentence-transformers takes, images decoded as RGB on white, each once.

    Videos are lists of frames.
    """
    if isinstance(value, Item):
        if value.image is not None and value.image not in opened:
            opened[value.image] = value.to_input()["image"]
        parts = {} if value.image is None else {"image": opened[value.image]}
        parts |= {} if value.video is None else {"video": value.video.open()}
        return parts if value.text is None else {**parts, "text": value.text}
    if isinstance(value, Image.Image):
        if id(value) not in opened:
            # Kept with its original, whose id no other image can get meanwhile.
            opened[id(value)] = value, padded_to_aspect(value if value.mode == "RGB" else to_rgb(value))
        return opened[id(value)][1]
    if isinstance(value, str) and is_image_url_or_path(value) and os.path.isfile(value):
        if value not in opened:
            opened[value] = padded_to_aspect(ImageRef(path=value).open())
        return opened[value]
    if isinstance(value, dict) and "role" not in value:
        parts = normalize_input(value)
        return {key: part if key == "text" else plain_input(part, opened) for key, part in parts.items()}
    if isinstance(value, VideoRef):
        return value.open()
    if isinstance(value, ImageRef):
        return padded_to_aspect(value.open())
    return value


def _image(value: object) -> object:
    """Turn the image of a dict into what an item takes."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        (value,) = value
    if isinstance(value, np.ndarray):
        value = _from_array(value)
    if isinstance(value, Image.Image):
        return ImageRef(data=_pixels(value))
    if isinstance(value, str) and _is_url(value):
        return fetch_bytes(value)
    # What is longer than any path is base64 text.
    if isinstance(value, str) and (value.startswith("data:") or len(value) > _LONGEST_PATH):
        raise TypeError("an image encoded as text is not supported: save it and pass its path")
    return value


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise TypeError(
            f"an array of shape {array.shape} and type {array.dtype} is not a supported image: expected uint8 of shape "
            "(height, width) or (height, width, 3 or 4)"
        )
    return Image.fromarray(array)


def _pixels(image: Image.Image) -> bytes:
    """Encode a Pillow image as PPM, which only copies pixels: these bytes are read once.

    The EXIF orientation of an RGB image is dropped, as ``predict`` and the authors' code take its pixels.
    """
    buffer = io.BytesIO()
    with decoding(label_of(image)):  # an image that was only opened is decoded here
        (image if image.mode == "RGB" else to_rgb(image)).save(buffer, "PPM")
    return buffer.getvalue()
