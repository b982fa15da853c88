"""Image URLs: download an encoded image within a time and size limit."""

from __future__ import annotations

import io
import time
from http.client import HTTPException
from urllib.request import Request, urlopen

from PIL import Image

from unime_st.data.images import MAX_BYTES, BadImageError

FETCH_SECONDS = 20.0
"""Default time limit in seconds for the download of an image."""


def fetch_image(url: str, *, seconds: float = FETCH_SECONDS) -> Image.Image:
    """Download an image.

    Args:
        url: ``http`` or ``https`` URL.
        seconds: Time limit for the whole download in seconds. Defaults to :data:`FETCH_SECONDS`.

    Returns:
        PIL.Image.Image: The image, not yet decoded.

    Raises:
        BadImageError: If the download fails, exceeds a limit, or is not an image.
    """
    try:
        return Image.open(io.BytesIO(fetch_bytes(url, seconds=seconds)))
    except (OSError, Image.DecompressionBombError) as error:
        raise BadImageError(f"image {url}: cannot be decoded ({error})") from error


def fetch_bytes(url: str, *, seconds: float = FETCH_SECONDS) -> bytes:
    """Download an encoded image.

    Args:
        url: ``http`` or ``https`` URL.
        seconds: Time limit for the whole download in seconds. Defaults to :data:`FETCH_SECONDS`.

    Returns:
        bytes: Content of the file.

    Raises:
        BadImageError: If the download fails, takes longer than ``seconds``, or is larger than
            :data:`~unime_st.data.images.MAX_BYTES`.
    """
    deadline = time.monotonic() + seconds
    content = bytearray()
    try:
        request = Request(url, headers={"User-Agent": "unime-st"})
        with urlopen(request, timeout=seconds) as answer:
            while block := answer.read1(1 << 16):
                content += block
                if len(content) > MAX_BYTES:
                    raise BadImageError(f"image {url}: more than the {MAX_BYTES} bytes that an image may have")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not complete after {seconds:g} seconds")
        return bytes(content)
    except (OSError, HTTPException) as error:
        raise BadImageError(f"image {url}: cannot be fetched ({error})") from error
