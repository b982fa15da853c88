"""Video references: stored frames, video files and decoders, of which a few frames are decoded when they are needed."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
from PIL import Image

from unime_st.data.image_arrays import image_from_array
from unime_st.data.images import MAX_PIXELS, BadImageError, ImageLike, ImageRef, as_image_ref, decoding
from unime_st.files import content_digest, digest

NUM_FRAMES = 8
"""Number of frames that are sampled from a folder, a video file or a decoder unless another number is given."""

MAX_FRAMES = 64
"""Maximum number of frames that a model is given."""

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
"""Names of files in a folder that are frames."""

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".wmv", ".flv")
"""Names of files that are videos."""


class BadVideoError(BadImageError):
    """A video is missing, empty, corrupt or inconsistent. The message names the video, the frame and the reason."""


class NoVideoDecoderError(BadVideoError, ImportError):
    """A video is a file, and torchcodec or the libraries of FFmpeg are not installed."""


@runtime_checkable
class FrameDecoder(Protocol):
    """What a decoder must have; that of ``torchcodec`` has it."""

    metadata: Any

    def get_frames_at(self, indices: list[int]) -> Any:
        """Decode frames: an object with ``data``, uint8 of shape (n, 3, height, width) or (n, height, width, 3)."""


@dataclass(frozen=True)
class VideoRef:
    """Reference to a video: stored frames, a video file or a decoder, and the number of frames that are sampled of it.

    Args:
        frames: The sampled frames, see :meth:`of_folder` and :meth:`of_frames`.
        path: Video file, decoded by ``torchcodec`` (``pip install "unime-st[video]"``).
        decoder: Object with ``metadata.num_frames`` and ``get_frames_at``, such as a ``torchcodec`` decoder.
        num_frames: Number of frames that are sampled, see :func:`sample_indices`. None takes all.

    Raises:
        ValueError: If not exactly one of ``frames``, ``path`` and ``decoder`` is given, or ``num_frames`` is out of
            range.

    Example:
        >>> from PIL import Image
        >>> from unime_st.data.videos import VideoRef
        >>> frames = [Image.new("RGB", (4, 2), color) for color in ("red", "green", "blue")]
        >>> VideoRef.of_frames(frames).shape()
        (3, 4, 2)
        >>> VideoRef.of_frames(frames, num_frames=2).open()[1].getpixel((0, 0))
        (0, 0, 255)
    """

    frames: tuple[ImageRef, ...] = ()
    path: str | None = None
    decoder: FrameDecoder | None = field(default=None, repr=False)
    num_frames: int | None = None

    def __post_init__(self) -> None:
        if bool(self.frames) + (self.path is not None) + (self.decoder is not None) != 1:
            raise ValueError(
                "a video has frames, a path or a decoder: give exactly one of them, and at least one frame"
            )
        if self.num_frames is not None and not 1 <= self.num_frames <= MAX_FRAMES:
            raise ValueError(f"num_frames must be between 1 and {MAX_FRAMES}, got {self.num_frames}")
        check_num_frames(len(self.frames), self.label)

    @classmethod
    def of_folder(cls, folder: str | Path, num_frames: int | None = NUM_FRAMES) -> VideoRef:
        """Refer to frames stored in a folder, in natural order (``frame_2.jpg`` before ``frame_10.jpg``).

        Args:
            folder: Folder with JPEG or PNG files.
            num_frames: As for the class. Defaults to 8.

        Raises:
            BadVideoError: If the folder cannot be read, has no frames, or a number is missing in their names.
        """
        names = frame_names(folder)
        if not names:
            raise BadVideoError(f"video {folder}: the folder has no frames ({', '.join(FRAME_SUFFIXES)})")
        if (missing := missing_frame(names)) is not None:
            raise BadVideoError(f"video {folder}: frame {missing} is missing; copy the folder again")
        chosen = sample_indices(len(names), num_frames)
        return cls(tuple(ImageRef(path=os.path.join(folder, names[index])) for index in chosen), num_frames=num_frames)

    @classmethod
    def of_frames(cls, frames: Sequence[ImageLike], num_frames: int | None = None) -> VideoRef:
        """Refer to frames in their order of time.

        Args:
            frames: Pillow images, paths, encoded bytes or :class:`ImageRef`.
            num_frames: As for the class. Defaults to None, all frames.

        Raises:
            ValueError: If ``frames`` is empty.
        """
        indices = sample_indices(len(frames), num_frames)
        return cls(tuple(as_image_ref(frames[index]) for index in indices), num_frames=num_frames)

    @classmethod
    def of(cls, video: VideoRef | FrameDecoder | str | Path | np.ndarray | Sequence[ImageLike]) -> VideoRef:
        """Refer to a video in any form that an :class:`~unime_st.Item` takes; 8 frames are sampled unless it is a list.

        Args:
            video: Folder of frames, video file, list or tuple of frames, decoder, or uint8 array or tensor of shape
                (n, height, width, 3) or (n, 3, height, width).

        Raises:
            TypeError: If it has another type.
            BadVideoError: If a folder has no frames or a frame is missing.
        """
        if isinstance(video, VideoRef):
            return video
        if isinstance(video, (str, Path)):
            if os.path.isdir(video):
                return cls.of_folder(video)
            return cls(path=str(video), num_frames=NUM_FRAMES)
        if isinstance(video, (list, tuple)):
            return cls.of_frames(video)
        if isinstance(video, FrameDecoder):
            return cls(decoder=video, num_frames=NUM_FRAMES)
        if hasattr(video, "numpy"):  # a torch tensor
            video = video.numpy(force=True)
        if isinstance(video, np.ndarray) and video.ndim == 4 and len(video):
            return cls.of_frames([image_from_array(frame, channels_first=video.shape[1] == 3) for frame in video])
        raise TypeError(
            f"Item.video must be a folder, a file, frames, a decoder or a VideoRef, got {type(video).__name__}"
        )

    @property
    def label(self) -> str:
        """Short name for messages: the file, the folder of the frames, or the number of frames."""
        if self.path is not None:
            return self.path
        first = self.frames[0] if self.frames else None
        if first is not None and first.path is not None and first.member is None:
            return os.path.dirname(first.path) or first.path
        return f"<{len(self.frames)} frames>" if first is not None else f"<{type(self.decoder).__name__}>"

    def digest(self) -> bytes:
        """Hash of the encoded frames (of a decoder: of the decoded ones) and of the number that is sampled.

        Raises:
            BadImageError: If a frame or the file cannot be read.
        """
        parts = [b"sampled", str(self.num_frames).encode()]
        if self.path is not None:
            parts += [b"file", bytes.fromhex(_file_digest(self.path))]
        elif self.frames:
            parts += [bytes.fromhex(digest(frame.read(), length=64)) for frame in self.frames]
        else:
            images = self.open()
            parts += [repr(images[0].size).encode(), *(bytes.fromhex(digest(image.tobytes())) for image in images)]
        return bytes.fromhex(digest(*parts, length=64))

    def shape(self) -> tuple[int, int, int]:
        """Number of sampled frames, width and height in pixels, from the headers.

        Raises:
            BadVideoError: If the frames differ in size, are too large, or the header of the file cannot be read.
            BadImageError: If a frame cannot be read.
        """
        if self.frames:
            return self._checked_shape([frame.size() for frame in self.frames])
        decoder = self._decoder()
        count = _num_stored(decoder.metadata, self.label)
        width, height = (getattr(decoder.metadata, name, None) for name in ("width", "height"))
        if not width or not height:
            width, height = self._decode(decoder, [0])[0].size
        return len(self._sampled(count)), int(width), int(height)

    def open(self) -> list[Image.Image]:
        """Open the sampled frames; stored ones are decoded only when their pixels are used, one by one.

        Returns:
            list[PIL.Image.Image]: Frames of equal size in their stored mode; ``filename`` names them for messages.

        Raises:
            BadVideoError: If the file cannot be decoded, or frames differ in size or are too large.
            BadImageError: If a frame cannot be read.
        """
        if not self.frames:
            decoder = self._decoder()
            return self._decode(decoder, self._sampled(_num_stored(decoder.metadata, self.label)))
        images: list[Image.Image] = []
        for frame in self.frames:
            with decoding(frame.label, "opened"):
                image = Image.open(io.BytesIO(frame.read()))
            image.filename = frame.label  # names it in messages
            images.append(image)
        self._checked_shape([image.size for image in images])
        return images

    def stored_frames(self) -> tuple[ImageRef, ...]:
        """The sampled frames, encoded: those of a file or a decoder are decoded and encoded without loss.

        Raises:
            BadImageError: If the file cannot be decoded.
        """
        return self.frames or VideoRef.of_frames(self.open()).frames

    def check(self) -> None:
        """Decode all sampled frames, one at a time.

        Raises:
            BadImageError: If one cannot be decoded; the message names it.
        """
        for image in self.open():
            with decoding(f"{self.label}, frame {getattr(image, 'filename', '')}"):
                image.load()

    def _checked_shape(self, sizes: list[tuple[int, int]]) -> tuple[int, int, int]:
        width, height = sizes[0]
        for frame, size in zip(self.frames, sizes):
            if size != sizes[0]:
                raise BadVideoError(
                    f"video {self.label}: frame {frame.label} has {size[0]} x {size[1]} pixels and the first one "
                    f"{width} x {height}; all frames must have one size"
                )
        if width * height > MAX_PIXELS:
            raise BadVideoError(f"video {self.label}: {width} x {height} is more than {MAX_PIXELS} pixels; resize it")
        return len(sizes), width, height

    def _sampled(self, stored: int) -> list[int]:
        indices = sample_indices(stored, self.num_frames)
        check_num_frames(len(indices), self.label)
        return indices

    def _decoder(self) -> FrameDecoder:
        return self.decoder if self.path is None and self.decoder is not None else _open_file(str(self.path))

    def _decode(self, decoder: FrameDecoder, indices: list[int]) -> list[Image.Image]:
        with _video_errors(self.label):
            found = decoder.get_frames_at(indices).data
            array = found.numpy(force=True) if hasattr(found, "numpy") else np.asarray(found)
        return [image_from_array(frame, channels_first=array.shape[-1] != 3) for frame in array]


def sample_indices(stored: int, num_frames: int | None) -> list[int]:
    """Indices of the frames that are sampled: evenly spaced from first to last, rounded down; all if there are few.

    This is the rule of VLM2Vec-V2 (arXiv:2507.04590): ``np.linspace(0, stored - 1, num_frames, dtype=int)``.

    Args:
        stored: Number of frames there are.
        num_frames: Number of frames to take. None takes all.

    Example:
        >>> sample_indices(20, 8), sample_indices(3, 8)
        ([0, 2, 5, 8, 10, 13, 16, 19], [0, 1, 2])
    """
    if num_frames is None or stored <= num_frames:
        return list(range(stored))
    return [int(index) for index in np.linspace(0, stored - 1, num_frames, dtype=int)]


def check_num_frames(count: int, label: str) -> None:
    """Raise a BadVideoError for a video, named ``label``, of more than :data:`MAX_FRAMES` frames."""
    if count > MAX_FRAMES:
        raise BadVideoError(f"video {label}: {count} frames are more than {MAX_FRAMES}; sample them with num_frames")


def frame_names(folder: str | Path) -> list[str]:
    """Names of the frames in a folder in natural order.

    Raises:
        BadVideoError: If the folder cannot be read.
    """
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith(FRAME_SUFFIXES)]
    except OSError as error:
        raise BadVideoError(f"video {folder}: the folder cannot be read ({error})") from error
    return sorted(names, key=_natural)


def missing_frame(names: Sequence[str]) -> str | None:
    """Name part of the first frame that is missing in names numbered one by one, None if there is no gap.

    Names that differ in more than their number, or whose numbers never follow one another, are not checked.

    Example:
        >>> missing_frame(["frame_0001.jpg", "frame_0002.jpg", "frame_0004.jpg"])
        'frame_0003'
    """
    found = [re.fullmatch(r"(.*?)(\d+)", os.path.splitext(name)[0]) for name in names]
    matches = [match for match in found if match is not None]
    if len(matches) < len(names) or len({match[1] for match in matches}) > 1:
        return None
    numbers = [int(match[2]) for match in matches]
    steps = [after - before for before, after in pairwise(numbers)]
    if 1 not in steps or max(steps) == 1:
        return None
    last = next(index for index, step in enumerate(steps) if step > 1)
    return f"{matches[last][1]}{numbers[last] + 1:0{len(matches[last][2])}d}"


def is_frame_list(value: object) -> TypeGuard[list[ImageLike] | tuple[ImageLike, ...]]:
    """Whether a value is a list or tuple of images, which are the frames of one video."""
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_frame, value))


def _is_frame(value: object) -> bool:
    if isinstance(value, str):
        return value.lower().endswith(FRAME_SUFFIXES)
    return isinstance(value, (Image.Image, ImageRef, bytes, os.PathLike))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key with numbers as numbers, and texts regardless of case."""
    parts = re.split(r"(\d+)", name)
    return [(False, int(part), "") if part.isdecimal() else (True, 0, part.lower()) for part in parts]


def _num_stored(metadata: object, label: str) -> int:
    count = getattr(metadata, "num_frames", None)
    if not count:
        raise BadVideoError(f"video {label}: the decoder finds no frames")
    return int(count)


def _file_digest(path: str) -> str:
    if not os.path.isfile(path):  # also a pipe, which would block
        reason = "is not a regular file" if os.path.exists(path) else "no such file"
        raise BadVideoError(f"video {path}: cannot be read ({reason})")
    with _video_errors(path):
        return content_digest(path, length=64)


def video_decoder_class(path: str | Path) -> type[Any]:
    """Decoder of `torchcodec`.

    Args:
        path: Video file, for the message.

    Raises:
        NoVideoDecoderError: If it is not installed.
    """
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: the libraries of FFmpeg are missing
        reason = (str(error).splitlines() or [""])[0]  # torchcodec explains on many lines what it has tried
        raise NoVideoDecoderError(
            f"video {path}: decoding video files needs torchcodec and the libraries of FFmpeg: "
            f'pip install "unime-st[video]", or give the frames as a folder ({reason})'
        ) from error
    return VideoDecoder


def _open_file(path: str) -> FrameDecoder:
    decoder_class = video_decoder_class(path)
    if not os.path.isfile(path):
        raise BadVideoError(f"video {path}: cannot be read (no such file)")
    with _video_errors(path):
        return decoder_class(path, dimension_order="NHWC")


@contextmanager
def _video_errors(label: str) -> Iterator[None]:
    """Turn what a decoder raises into a :class:`BadVideoError` that names the video."""
    try:
        yield
    except (MemoryError, BadImageError):
        raise
    except Exception as error:  # decoders raise arbitrary exception types on corrupt files
        raise BadVideoError(f"video {label}: cannot be decoded ({error})") from error
