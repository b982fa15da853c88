"""Image preparation by the rule of a recipe: any input becomes the RGB image that the official code processed."""

from __future__ import annotations

import base64
import binascii
import io
import os

import numpy as np
import torch
from PIL import Image, ImageOps

from unime_st.data.images import BadImageError
from unime_st.recipes.recipe import ImageRule


def open_image(source: object) -> Image.Image:
    """Open an image without changing its mode, size or orientation.

    Args:
        source: PIL image, path, ``http(s)`` URL, data URI or base64 text; or an array or tensor of ``uint8`` with the
            channels (1, 3 or 4) last or first.

    Raises:
        BadImageError: It cannot be read or decoded; the message names it.
        TypeError: It has another type.

    Example:
        >>> open_image(np.zeros((2, 3, 3), dtype=np.uint8)).size
        (3, 2)
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _from_array(source)
    if not isinstance(source, str):
        raise TypeError(f"An image is a PIL image, path, URL, data URI or array, got {type(source).__name__}.")
    label = source if len(source) <= 200 else source[:60] + "..."
    try:
        image = Image.open(_bytes_of(source) if not os.path.isfile(source) else source)
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImageError(f"image {label}: cannot be opened ({error})") from error
    return image


def _bytes_of(source: str) -> io.BytesIO:
    if source.startswith(("http://", "https://")):
        from huggingface_hub.utils import get_session

        response = get_session().get(source, follow_redirects=True)
        if response.status_code != 200:
            raise OSError(f"the server answered {response.status_code}")
        return io.BytesIO(response.content)
    encoded = source.split(",", 1)[1] if source.startswith("data:image/") else source
    try:
        return io.BytesIO(base64.b64decode(encoded, validate=True))
    except binascii.Error as error:
        raise OSError("no such file, and not a URL or base64 text") from error


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    values = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else array
    if values.ndim == 3 and values.shape[-1] not in (1, 3, 4) and values.shape[0] in (1, 3, 4):
        values = np.moveaxis(values, 0, -1)
    if values.dtype != np.uint8 or values.ndim != 3 or values.shape[-1] not in (1, 3, 4):
        raise BadImageError(
            f"image array of shape {tuple(values.shape)} and type {values.dtype}: expected uint8 values and 1, 3 or 4 "
            "channels, last or first"
        )
    return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def prepare_image(source: object, rule: ImageRule, side: int | None) -> Image.Image:
    """Convert an image, see :func:`open_image`, to RGB as the official code does.

    ``side`` is that of the square to squash to, in pixels; None keeps the size. The result has no EXIF data, so that
    no later step rotates it again.

    Example:
        >>> prepare_image(Image.new("P", (30, 20)), ImageRule(), 28).size
        (28, 28)
    """
    image = open_image(source)
    try:
        if side is not None:
            image = image.resize((side, side))  # Pillow's default: bicubic, nearest neighbour for palettes
        if rule.exif:
            image = ImageOps.exif_transpose(image)
        if rule.alpha == "white" and image.mode == "RGBA":
            white = Image.new("RGB", image.size, (255, 255, 255))
            white.paste(image, mask=image.getchannel("A"))
            image = white
        rgb = image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # a PIL image reads its file only now
        name = getattr(source, "filename", None) or f"of mode {image.mode} and size {image.size}"
        raise BadImageError(f"image {name}: cannot be decoded ({error})") from error
    if rgb is source:
        rgb = rgb.copy()
    rgb.info = {}
    return rgb
