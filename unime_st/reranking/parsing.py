"""What ``rank`` takes, as items; what cannot be read is kept as the reason."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from sentence_transformers.base.modality import is_image_url_or_path

from unime_st.data import BadImageError, ImageRef, Item
from unime_st.data.images import to_rgb
from unime_st.encoding.image_urls import fetch_bytes
from unime_st.scoring.prompts import as_item

Offer = Item | Exception
"""An item; or a :class:`BadImageError`, why it cannot be read; or another error, why this is no item."""

_LONGEST_PATH = 4096


class _Blank(Item):
    """A text without a visible character: nothing to store or to embed, but a prompt can show it."""

    __slots__ = ()

    def __init__(self, text: str) -> None:
        self._text, self._image, self._id = text, None, None


def to_item(value: Any) -> Item:
    """Turn an input of ``rank`` into an item; a text that is an image's URL or existing path is that image.

    Args:
        value: Item, text (also an empty one), Pillow image or dict of them. The image of a dict may also be a path,
            a URL (fetched here), encoded bytes, an array of 8-bit RGB, RGBA or grey pixels, or a list of one of these.

    Returns:
        Item: The same content.

    Raises:
        BadImageError: If an image in memory cannot be decoded or a URL not fetched. A file is read when it is used.
        TypeError: If the value is something else.
        ValueError: If nothing is in it.

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
    if value.get("image") is not None:
        return as_item({**value, "image": _image(value["image"])})
    text = value.get("text")
    if isinstance(text, str) and not text.strip() and value.keys() <= {"text", "image"}:
        return _Blank(text)
    return as_item(value)


def to_offers(values: Sequence[Any]) -> list[Offer]:
    """Turn each input into an item, or the error that keeps it from being one.

    Args:
        values: See :func:`to_item`.

    Returns:
        list: Per input its item or its error.

    Example:
        >>> from unime_st.reranking.parsing import to_offers
        >>> [type(offer).__name__ for offer in to_offers(["a red square", 3])]
        ['Item', 'TypeError']
    """
    offers: list[Offer] = []
    for value in values:
        try:
            offers.append(to_item(value))
        except (TypeError, ValueError, AttributeError) as error:
            offers.append(error)
    return offers


def unreadable(offers: Sequence[Offer], *, decode: bool) -> list[ValueError | None]:
    """Find what cannot be read, as far as that shows before a model runs.

    Args:
        offers: Result of :func:`to_offers`.
        decode: Whether to decode the images, too, instead of only reading the files.

    Returns:
        list[ValueError | None]: Per offer the :class:`BadImageError`, or None.
    """
    reasons: list[ValueError | None] = []
    for offer in offers:
        try:
            if isinstance(offer, BadImageError):
                raise offer
            if isinstance(offer, Item):
                if decode and offer.image is not None:
                    offer.image.open()
                hash(offer)  # of the content, which is read for it
            reasons.append(None)
        except BadImageError as error:
            reasons.append(error)
    return reasons


def check_query(query: Offer) -> None:
    """Refuse a query whose image cannot be read: without it there is nothing to rank for.

    Args:
        query: See :func:`to_offers`.

    Raises:
        BadImageError: If it cannot be read.
    """
    (reason,) = unreadable([query], decode=True)
    if reason is not None:
        raise reason


def foreign(offers: Sequence[Offer]) -> int | None:
    """Find the first input that is no item.

    Args:
        offers: Result of :func:`to_offers`.

    Returns:
        int | None: Its place, if there is one.
    """
    indices = (index for index, offer in enumerate(offers) if not isinstance(offer, (Item, BadImageError)))
    return next(indices, None)


def refuse_foreign(query: Offer, documents: Sequence[Offer]) -> None:
    """Raise what is wrong with the first input that is no item, and say which it is.

    Args:
        query: See :func:`to_offers`.
        documents: The same.
    """
    index = foreign([query, *documents])
    if index is not None:
        error = [query, *documents][index]
        name = f"document {index - 1}" if index else "query"
        raise (ValueError if isinstance(error, ValueError) else TypeError)(f"{name}: {error}")


def _image(value: Any) -> Any:
    """Something that an item takes as its image."""
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
        raise TypeError("an image that is written as text is no item: save it and give its path")
    return value


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise TypeError(
            f"an array of shape {array.shape} and type {array.dtype} is no item: expected uint8 of shape "
            "(height, width) or (height, width, 3 or 4)"
        )
    return Image.fromarray(array)


def _pixels(image: Image.Image) -> bytes:
    """A Pillow image as PPM, whose encoding and decoding is copying: these bytes are read once and thrown away.

    An RGB image goes without what its file says about orientation: ``predict`` and the authors take its pixels.
    """
    buffer = io.BytesIO()
    try:
        (image if image.mode == "RGB" else to_rgb(image)).save(buffer, "PPM")
    except MemoryError:
        raise
    except Exception as error:  # an image that was only opened is decoded here, and decoders raise nearly any type
        name = getattr(image, "filename", "") or f"<{image.mode}, {image.width} x {image.height}>"
        raise BadImageError(f"image {name}: cannot be decoded ({error})") from error
    return buffer.getvalue()
