"""Content keys: hashable keys that are equal only for inputs with equal content."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Hashable, Iterator, Mapping

import numpy as np
import torch
from PIL import Image, ImageFile

from unime_st.data.image_urls import is_url
from unime_st.data.images import ImageRef
from unime_st.data.items import Item
from unime_st.data.videos import VideoRef
from unime_st.encoding.model_inputs import is_media
from unime_st.files import digest

_BLOCK = 1 << 20


def content_key(value: object, *, name: str | None = None) -> Hashable:
    """Key that is equal for two normalized inputs only if their contents are equal, and keeps no image in memory.

    Images are compared by their bytes or pixels, files by device, inode, size and times as well as by path. URLs are
    compared as strings, since the engine downloads each URL once. Whatever cannot be compared for certain, such as an
    object of an unknown type, equals nothing else. ``name`` is the part ("text", "image", ...) that the value belongs
    to.

    Raises:
        BadImageError: If the image of an :class:`~unime_st.Item` cannot be read.

    Example:
        >>> from PIL import Image
        >>> from unime_st.encoding.content_keys import content_key
        >>> content_key(Image.new("RGB", (2, 2))) == content_key(Image.new("RGB", (2, 2)))
        True
    """
    if isinstance(value, str):
        is_file = name not in ("text", "content") and (name is not None or is_media(value)) and not is_url(value)
        return (value, *_file_state(value)) if is_file else value
    if isinstance(value, (int, float, bool, type(None))):
        return type(value).__name__, value
    if isinstance(value, Item):
        return bytes.fromhex(value.id)
    if isinstance(value, ImageRef):
        return bytes.fromhex(Item(image=value).id)
    if isinstance(value, VideoRef):
        return bytes.fromhex(Item(video=value).id)
    if isinstance(value, (bytes, bytearray)):
        return "bytes", digest(bytes(value))
    if isinstance(value, Mapping):
        # The order of the parts matters to chat templates.
        return (
            "dict",
            *((part, content_key(value[part], name="text" if part in ("role", "type") else part)) for part in value),
        )
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(content_key(part, name=name) for part in value))
    if isinstance(value, Image.Image):
        return _pillow_key(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return "array", value.shape, value.dtype.str, digest(np.ascontiguousarray(value).tobytes())
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        content = plain.view(-1).view(torch.uint8).numpy().tobytes()
        return "tensor", tuple(plain.shape), str(plain.dtype), digest(content)
    return object()


def _file_state(path: str) -> tuple[Hashable, ...]:
    """What changes when the content of a file does; nothing for a text that is not the path of a file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _pillow_key(image: Image.Image) -> Hashable:
    """Key of a Pillow image: of its encoded bytes if it has not been decoded yet, else of its pixels."""
    try:
        if isinstance(image, ImageFile.ImageFile) and _is_undecoded(image):
            # Drafts and edited metadata change what will be decoded.
            state = repr((image.tile, getattr(image, "decoderconfig", None), image.info))
            return "file", image.format, image.mode, image.size, digest(*_encoded(image)), digest(state)
        pixels = digest(image.tobytes())  # decodes it
        palette = image.getpalette() if image.mode in ("P", "PA") else None
        return "pixels", image.mode, image.size, pixels, digest(repr((palette, image.info)))
    except (OSError, ValueError, AttributeError, SyntaxError, Image.DecompressionBombError):
        return object()  # the error is reported on decoding


def _is_undecoded(image: ImageFile.ImageFile) -> bool:
    if image.fp is None:  # closed once the pixels are read, except for formats with several frames
        return False
    if image.format in ("WEBP", "AVIF"):  # have no tiles before decoding either
        return not getattr(image, "is_animated", False)
    return bool(image.tile) and image.tell() == 0  # later frames are drawn over earlier ones


def _encoded(image: ImageFile.ImageFile) -> Iterator[bytes]:
    """Encoded bytes of an image that has not been decoded, read without moving the position of its file."""
    if isinstance(image.fp, io.BytesIO):
        yield image.fp.getvalue()
        return
    number = image.fp.fileno() if image.fp is not None else -1
    if not (hasattr(os, "pread") and stat.S_ISREG(os.fstat(number).st_mode)):
        raise OSError("the source of the image cannot be read twice")
    start = 0
    while block := os.pread(number, _BLOCK, start):
        yield block
        start += len(block)
