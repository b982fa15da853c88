"""Images that stay undecoded until somebody needs their pixels."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zipfile
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels: 256 MiB as RGB, Pillow's own warning line."""

MAX_BYTES = 1 << 28
"""Largest encoded image that is read, in bytes."""

MAX_ASPECT = 200
"""Longest image for its width: the image processors of the Qwen-VL family refuse anything beyond."""

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(ValueError):
    """An image is missing, corrupt, too large or outside its data folder; the message names it and says why."""


@dataclass(frozen=True)
class ImageRef:
    """Where an image is, without its pixels.

    Args:
        path: File that holds the encoded image, or the zip archive that holds ``member``.
        data: The encoded image itself (JPEG, PNG, ... bytes).
        member: Name of the entry inside the zip archive at ``path``.

    Raises:
        ValueError: If not exactly one of ``path`` and ``data`` is given, or ``member`` comes without ``path``.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> from unime_st.data import ImageRef
        >>> buffer = io.BytesIO()
        >>> Image.new("RGBA", (2, 3)).save(buffer, "PNG")
        >>> image = ImageRef(data=buffer.getvalue()).open()
        >>> image.mode, image.size, image.getpixel((0, 0))
        ('RGB', (2, 3), (255, 255, 255))
    """

    path: str | None = None
    data: bytes | None = field(default=None, repr=False)
    member: str | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.data is None):
            raise ValueError("ImageRef takes exactly one of path and data")
        if self.member is not None and self.path is None:
            raise ValueError("ImageRef.member names an entry of the zip archive at path; path is missing")

    @property
    def label(self) -> str:
        """Short name for messages: the path, or the first digits of the content hash of bytes."""
        if self.data is not None:
            return f"<{len(self.data)} bytes, sha256 {hashlib.sha256(self.data).hexdigest()[:8]}>"
        return f"{self.path}::{self.member}" if self.member is not None else str(self.path)

    def read(self) -> bytes:
        """Return the encoded image.

        Returns:
            bytes: The file, zip entry or bytes as they are, undecoded.

        Raises:
            BadImageError: If there is no such file or entry, or it is larger than :data:`MAX_BYTES`.
        """
        if self.data is not None:
            return self.data
        try:
            return _read_member(str(self.path), self.member) if self.member is not None else _read_file(str(self.path))
        except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
            # RuntimeError is what zipfile raises where a member is encrypted or packed by a method that it lacks.
            raise BadImageError(f"image {self.label}: cannot be read ({error})") from error

    def size(self) -> tuple[int, int]:
        """Return (width, height) as stored, from the header alone.

        Raises:
            BadImageError: If the image cannot be read or its header cannot be understood.
        """
        if self.data is None and self.member is None and _is_regular(str(self.path)):
            with _open_header(str(self.path), self.label) as image:
                return image.size
        with _open_header(io.BytesIO(self.read()), self.label) as image:
            return image.size

    def open(self, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """Decode the image.

        The first frame of an animation is taken, the EXIF orientation applied, transparency composited on white,
        16-bit and floating-point greys scaled to 8 bits.

        Args:
            max_pixels: Images with more pixels are refused before any pixel is decoded. Defaults to
                :data:`MAX_PIXELS`; Pillow's own limit (twice the default) holds above it.

        Returns:
            PIL.Image.Image: Mode RGB, fully loaded.

        Raises:
            BadImageError: If the image is missing, corrupt, truncated or too large.
        """
        with _open_header(io.BytesIO(self.read()), self.label) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadImageError(
                    f"image {self.label}: {width} x {height} is more than {max_pixels} pixels; "
                    "make it smaller or raise max_pixels"
                )
            try:
                return to_rgb(image)
            except MemoryError:
                raise
            except Exception as error:  # decoders raise nearly any type on hostile bytes; the cause is kept
                raise BadImageError(f"image {self.label}: cannot be decoded ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Make any Pillow image upright, opaque, 8-bit RGB.

    Args:
        image: An image in any mode Pillow knows.

    Returns:
        PIL.Image.Image: Mode RGB; transparent pixels are composited on white, as a browser shows them.

    Example:
        >>> from PIL import Image
        >>> from unime_st.data.images import to_rgb
        >>> to_rgb(Image.new("I;16", (1, 1), 65535)).getpixel((0, 0))
        (255, 255, 255)
    """
    image.load()
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled_grey(image).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def padded_to_aspect(image: Image.Image, limit: int = MAX_ASPECT) -> Image.Image:
    """Widen an extremely long image with white margins, so that every image processor takes it.

    Args:
        image: An RGB image.
        limit: Largest ratio of the longer to the shorter side. Defaults to :data:`MAX_ASPECT`.

    Returns:
        PIL.Image.Image: The image itself when it is within the limit.

    Example:
        >>> from PIL import Image
        >>> from unime_st.data.images import padded_to_aspect
        >>> padded_to_aspect(Image.new("RGB", (20000, 10))).size
        (20000, 100)
    """
    width, height = image.size
    shortest = -(-max(width, height) // limit)
    if min(width, height) >= shortest:
        return image
    canvas = Image.new("RGB", (max(width, shortest), max(height, shortest)), "white")
    canvas.paste(image, ((canvas.width - width) // 2, (canvas.height - height) // 2))
    return canvas


def png_bytes(image: Image.Image) -> bytes:
    """Encode a Pillow image as PNG without losing what :func:`to_rgb` shows of it.

    Args:
        image: An image in any mode.

    Returns:
        bytes: A PNG file; the same pixels always give the same bytes.
    """
    buffer = io.BytesIO()
    # The fastest level: these bytes live in memory or in one shard, and encoding is what costs.
    to_rgb(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def resolve_inside(root: str | Path, name: str) -> Path:
    """Turn a path found in data into a real path that lies inside ``root``.

    Args:
        root: Folder that the data may refer to.
        name: Path from the data: relative to ``root``, or absolute and inside it.

    Returns:
        Path: Absolute path, symbolic links resolved. It need not exist.

    Raises:
        BadImageError: If the path leaves ``root`` through ``..``, an absolute path or a symbolic link.
    """
    try:
        name.encode("utf-8")  # a lone surrogate could not be stored
        base = Path(root).resolve()
        target = (base / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise BadImageError(f"image {name!r}: not a usable path ({error})") from error
    if not target.is_relative_to(base):
        raise BadImageError(
            f"image {name!r}: lies outside the image root {base}; move it there or set another image root"
        )
    return target


def _is_regular(path: str) -> bool:
    # A pipe or a device would block or never end.
    if path.startswith(("http://", "https://")):
        raise BadImageError(f"image {path}: URLs are not fetched; download the file and give its path")
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise BadImageError(f"image {path}: cannot be read ({error})") from error
    if not stat.S_ISREG(found.st_mode):
        raise BadImageError(f"image {path}: is not a regular file")
    if found.st_size > MAX_BYTES:
        raise BadImageError(f"image {path}: {found.st_size} bytes is more than the {MAX_BYTES} that an image may have")
    return True


def _read_file(path: str) -> bytes:
    _is_regular(path)
    with open(path, "rb") as file:
        return file.read()


@lru_cache(maxsize=16)
def _archive(path: str, process: int) -> zipfile.ZipFile:
    # Reading the directory of a large archive costs seconds, hence the cache; a forked worker needs a file
    # position of its own, hence the process id in the key.
    return zipfile.ZipFile(path)


def _read_member(path: str, member: str) -> bytes:
    archive = _archive(path, os.getpid())
    if archive.getinfo(member).file_size > MAX_BYTES:
        raise BadImageError(f"image {path}::{member}: unpacks to more than {MAX_BYTES} bytes")
    return archive.read(member)


def _open_header(source: str | io.BytesIO, label: str) -> Image.Image:
    try:
        return Image.open(source)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly any type on hostile bytes; the cause is kept
        reason = "not an image in a known format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise BadImageError(f"image {label}: cannot be opened ({reason})") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, EOFError):
        return image  # a garbled EXIF block says nothing about the orientation; the pixels are fine
    operation = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image.transpose(operation) if operation is not None else image


def _scaled_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    peak = float(values.max(initial=0.0))
    # Pillow clips such modes at 255 instead of scaling them. Integers are 16-bit greys unless they exceed that;
    # floats are in [0, 1] by convention, and anything else is scaled by its own maximum.
    top = max(65535.0, peak) if image.mode != "F" else max(1.0, peak)
    return Image.fromarray(np.clip(values / top * 255.0 + 0.5, 0, 255).astype(np.uint8))
