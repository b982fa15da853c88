"""Input images: load the image of an input from a path, URL, array, bytes or Pillow image."""

from __future__ import annotations

import base64
import io
import os

import numpy as np
import torch
from PIL import Image

from unime_st.compat import plain_image
from unime_st.data.image_arrays import image_from_array
from unime_st.data.image_urls import fetch_image, is_url
from unime_st.data.images import MAX_PIXELS, BadImageError, ImageRef, decoding, label_of, padded_to_aspect, to_rgb

_PASSED_ON = ("JPEG", "PNG", "WEBP", "GIF")
"""Formats that every processor decodes, unless they are animated; these files are passed on by path."""

ImageSource = str | bytes | Image.Image | np.ndarray | torch.Tensor | ImageRef
"""Forms of an image in an input, after :func:`~unime_st.encoding.model_inputs.normalize_input`."""


def load_image(source: ImageSource) -> str | Image.Image:
    """Load an image as far as its processor needs help.

    Files in common formats are checked and passed on by path, and data URIs as they are, as in Sentence Transformers.
    Animations (of which the first frame counts), other formats and deep grayscale, which processors refuse or clip,
    are decoded here. URLs are downloaded. Arrays become RGB images.

    Raises:
        BadImageError: If the image cannot be read, downloaded or decoded, or has too many pixels; the message names
            it.

    Example:
        >>> import numpy as np
        >>> from unime_st.encoding.input_images import load_image
        >>> load_image(np.zeros((2, 3), dtype=bool)).mode
        'RGB'
    """
    if isinstance(source, Image.Image):
        return _load_pillow(source)
    if isinstance(source, ImageRef):
        return padded_to_aspect(source.open())
    if isinstance(source, bytes):
        return padded_to_aspect(ImageRef(data=source).open())
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return image_of_array(source)
    return fetch_image(source) if is_url(source) else _load_file(source)


def image_of_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    """Convert a numpy or torch array to an RGB image; tensors have their channels first if the shape fits both."""
    if isinstance(array, np.ndarray):
        return image_from_array(array)
    plain = array.detach().cpu()
    return image_from_array((plain.float() if plain.dtype == torch.bfloat16 else plain).numpy(), channels_first=True)


def image_size(source: ImageSource) -> tuple[int, int] | None:
    """(width, height) from the header of an image; None if it cannot be opened or lies behind a URL."""
    if isinstance(source, Image.Image):
        return source.size
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _array_size(tuple(source.shape), channels_first=isinstance(source, torch.Tensor))
    if isinstance(source, str) and is_url(source):
        return None
    try:
        if isinstance(source, str):
            with _open(source) as image:
                return image.size
        return (ImageRef(data=source) if isinstance(source, bytes) else source).size()
    except BadImageError:  # reported on decoding
        return None


def _array_size(shape: tuple[int, ...], channels_first: bool) -> tuple[int, int] | None:
    if len(shape) == 2:
        return shape[1], shape[0]
    if len(shape) != 3:
        return None
    first, last = (shape[axis] in (1, 3, 4) for axis in (0, 2))
    height, width = shape[1:] if first and (channels_first or not last) else shape[:2]
    return width, height


def _load_pillow(image: Image.Image) -> Image.Image:
    """Decode a Pillow image; 16-bit and floating-point grayscale is scaled, where processors would clip it."""
    with decoding(label_of(image)):
        image.load()
        return to_rgb(image) if image.mode.startswith("I") or image.mode == "F" else image


def _load_file(source: str) -> str | Image.Image:
    label = _label(source)
    with _open(source) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImageError(f"image {label}: {width} x {height} is more than {MAX_PIXELS} pixels; resize it")
        deep = image.mode.startswith("I") or image.mode == "F"
        if image.format in _PASSED_ON and not deep and not getattr(image, "is_animated", False):
            return source
        with decoding(label):
            image.load()
            return to_rgb(image) if deep else plain_image(image)


def _open(source: str) -> Image.Image:
    """Open a path or data URI, without decoding the pixels."""
    label = _label(source)
    if source.startswith("data:"):
        try:
            content = io.BytesIO(base64.b64decode(source.split(",", 1)[1]))
        except (ValueError, IndexError) as error:
            raise BadImageError(f"image {label}: is not a base64 data URI ({error})") from error
    elif not os.path.isfile(source):  # also a pipe, which would block
        reason = "is not a regular file" if os.path.exists(source) else "no such file"
        raise BadImageError(f"image {label}: cannot be read ({reason})")
    with decoding(label, "opened"):
        return Image.open(content if source.startswith("data:") else source)


def _label(source: str) -> str:
    return source if len(source) <= 200 else source[:60] + "..."
