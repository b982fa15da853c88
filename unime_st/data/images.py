"""Image references: encoded images that are decoded only when their pixels are needed."""

from __future__ import annotations

import io
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from unime_st.compat import plain_image
from unime_st.files import digest

MAX_PIXELS = 89_478_485
"""Maximum number of pixels of an image (256 MiB as RGB; the limit at which Pillow itself warns)."""

MAX_BYTES = 1 << 28
"""Maximum size of an encoded image in bytes."""

MAX_ASPECT = 200
"""Maximum aspect ratio (longer by shorter side) that the image processors of the Qwen-VL family accept."""

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
    """An image is missing, corrupt, too large or outside its data folder. The message names the image and the reason."""


@dataclass(frozen=True)
class ImageRef:
    """Reference to an encoded image in a file, in memory or in a zip archive.

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
        """Short name for messages: the path, or size and content hash of in-memory bytes."""
        if self.data is not None:
            return f"<{len(self.data)} bytes, sha256 {digest(self.data, length=8)}>"
        return f"{self.path}::{self.member}" if self.member is not None else str(self.path)

    def read(self) -> bytes:
        """Read the encoded image without decoding it.

        Returns:
            bytes: Content of the file, zip entry or in-memory image.

        Raises:
            BadImageError: If the file or entry does not exist, cannot be read, or is larger than :data:`MAX_BYTES`.
        """
        if self.data is not None:
            return self.data
        try:
            return _read_member(str(self.path), self.member) if self.member is not None else _read_file(str(self.path))
        except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
            # zipfile raises RuntimeError for an encrypted member and for an unknown compression method.
            raise BadImageError(f"image {self.label}: cannot be read ({error})") from error

    def size(self) -> tuple[int, int]:
        """Read the stored (width, height) from the header, without decoding the pixels.

        Raises:
            BadImageError: If the image cannot be read or its header cannot be understood.
        """
        if self.data is None and self.member is None and _is_regular(str(self.path)):
            with _open_header(str(self.path), self.label) as image:
                return image.size
        with _open_header(io.BytesIO(self.read()), self.label) as image:
            return image.size

    def open(self, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """Decode the image to 8-bit RGB.

        Takes the first frame of an animation, applies the EXIF orientation, composites transparency on white and
        scales 16-bit and floating-point grayscale to 8 bits.

        Args:
            max_pixels: Maximum number of pixels, checked before decoding. Defaults to :data:`MAX_PIXELS`. Pillow's
                own limit, twice the default, applies in any case.

        Returns:
            PIL.Image.Image: Fully loaded image in mode RGB.

        Raises:
            BadImageError: If the image is missing, corrupt, truncated or too large.
        """
        with _open_header(io.BytesIO(self.read()), self.label) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadImageError(
                    f"image {self.label}: {width} x {height} is more than {max_pixels} pixels; "
                    "resize it or raise max_pixels"
                )
            with decoding(self.label):
                converted = _converted(image)
                return plain_image(image) if converted is image else converted  # nobody else holds the pixels


ImageLike = ImageRef | Image.Image | str | Path | bytes
"""Forms of an image that :func:`as_image_ref` takes."""


def as_image_ref(image: ImageLike, name: str = "an image") -> ImageRef:
    """Refer to an image: a Pillow image (stored as lossless PNG), a path, encoded bytes or an :class:`ImageRef`.

    Raises:
        TypeError: If it has another type; the message calls it by ``name``.
    """
    if isinstance(image, ImageRef):
        return image
    if isinstance(image, Image.Image):
        return ImageRef(data=png_bytes(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return ImageRef(data=bytes(image))
    if isinstance(image, (str, Path)):
        return ImageRef(path=str(image))
    raise TypeError(f"{name} must be a Pillow image, a path, bytes or an ImageRef, got {type(image).__name__}")


@contextmanager
def decoding(label: str, action: str = "decoded") -> Iterator[None]:
    """Turn whatever a decoder raises in the block into a :class:`BadImageError` that names the image."""
    try:
        yield
    except (MemoryError, BadImageError):
        raise
    except Exception as error:  # decoders raise arbitrary exception types on corrupt bytes
        reason = "not an image in a known format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise BadImageError(f"image {label}: cannot be {action} ({reason})") from error


def label_of(image: Image.Image) -> str:
    """Short name of a Pillow image for messages: its file, or mode and size."""
    return getattr(image, "filename", "") or f"<{image.mode}, {image.width} x {image.height}>"


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a Pillow image of any mode to upright, opaque, 8-bit RGB; transparent pixels are composited on white.

    Example:
        >>> from PIL import Image
        >>> from unime_st.data.images import to_rgb
        >>> to_rgb(Image.new("I;16", (1, 1), 65535)).getpixel((0, 0))
        (255, 255, 255)
    """
    converted = _converted(image)
    return image.copy() if converted is image else converted


def _converted(image: Image.Image) -> Image.Image:
    """Result of :func:`to_rgb`; the loaded image itself where nothing is to be done."""
    image.load()
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_to_8_bit(image).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image


def padded_to_aspect(image: Image.Image, limit: int = MAX_ASPECT) -> Image.Image:
    """Pad an RGB image with white margins until its aspect ratio is within the limit of the image processors.

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
    """Encode a Pillow image losslessly as an RGB PNG, converted by :func:`to_rgb`; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    # Lowest compression: the bytes stay in memory or in one shard, so encoding time dominates.
    to_rgb(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def resolve_inside(root: str | Path, name: str) -> Path:
    """Resolve a path that comes from data, and require that it lies inside ``root``; the file may be missing.

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
            f"image {name!r}: outside the image root {base}; move the file there or set another image root"
        )
    return target


def _is_regular(path: str) -> bool:
    # Reading a pipe or a device could block for ever.
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
def _archive(path: str, state: tuple[int, ...], process: int) -> zipfile.ZipFile:
    # Cached because reading the directory of a large archive takes seconds. The process id is part of the key
    # because a forked worker must not share the file position of its parent, the state of the file because an archive
    # may be replaced.
    return zipfile.ZipFile(path)


def _read_member(path: str, member: str) -> bytes:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would block
        raise BadImageError(f"image {path}::{member}: {path} is not a regular file")
    archive = _archive(path, (found.st_ino, found.st_size, found.st_mtime_ns), os.getpid())
    if archive.getinfo(member).file_size > MAX_BYTES:
        raise BadImageError(f"image {path}::{member}: unpacks to more than {MAX_BYTES} bytes")
    return archive.read(member)


def _open_header(source: str | io.BytesIO, label: str) -> Image.Image:
    with decoding(label, "opened"):
        return Image.open(source)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, EOFError):
        return image  # a damaged EXIF block does not affect the pixels
    operation = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image.transpose(operation) if operation is not None else image


def _scale_to_8_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    peak = float(values.max(initial=0.0))
    # Pillow clips these modes at 255 instead of scaling. Integers are taken as 16-bit grayscale and floats as [0, 1];
    # an image with larger values is scaled by its own maximum.
    top = max(65535.0, peak) if image.mode != "F" else max(1.0, peak)
    return Image.fromarray(np.clip(values / top * 255.0 + 0.5, 0, 255).astype(np.uint8))
