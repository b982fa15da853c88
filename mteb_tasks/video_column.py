"""Video column of a dataset: stored frames, which foreign models read through a decoder as mteb's collators expect it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar, TypedDict

import numpy as np
import pyarrow as pa
import torch
from datasets.features.features import register_feature
from PIL import Image

from unime_st.data.images import ImageRef
from unime_st.data.videos import VideoRef

VIDEO_TYPE = pa.struct(
    {"frames": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})), "num_frames": pa.int32()}
)
"""Arrow type of a video: its sampled frames, and the number that was asked for."""

_BLANK = (56, 56)
_FRAMES_PER_SECOND = 1.0
_NO_VIDEO = 0
"""Number of frames of a row without video."""


class StoredImage(TypedDict):
    """An image of a table: encoded bytes or a path."""

    bytes: bytes | None
    path: str | None


class StoredVideo(TypedDict):
    """A video of a table, see :data:`VIDEO_TYPE`."""

    frames: list[StoredImage]
    num_frames: int | None


@dataclass
class VideoFeature:
    """Feature of `datasets` for videos that are stored as frames; rows are decoded to a `FrameReader`.

    Args:
        decode: Whether rows are decoded.
    """

    decode: bool = True
    pa_type: ClassVar[pa.DataType] = VIDEO_TYPE
    _type: str = field(default="StoredFrames", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        """Return the Arrow type."""
        return self.pa_type

    def encode_example(self, value: object) -> object:
        """Return a value as it is stored."""
        return value

    def decode_example(self, value: StoredVideo | None, token_per_repo_id: object = None) -> FrameReader:
        """Return a reader; a row without video has one black frame, because mteb's collators take no row without one."""
        return FrameReader(_frames_of(value) if value is not None and value["frames"] else None)

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        """Cast an array to the type of the column."""
        return storage.cast(self.pa_type)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # says that the function is experimental
    register_feature(VideoFeature, "StoredFrames")


class FrameReader:
    """Frames with the interface of a ``torchcodec`` decoder; frames are read when they are asked for.

    Stored frames have no times: they count as one a second, so that a collator that takes one or more frames a second
    takes all of them.

    Args:
        video: The frames; None stands for one black frame.
    """

    def __init__(self, video: VideoRef | None) -> None:
        self.video = video
        count, width, height = (1, *_BLANK) if video is None else video.shape()
        seconds = count / _FRAMES_PER_SECOND
        self.metadata = SimpleNamespace(
            num_frames=count, width=width, height=height, average_fps=_FRAMES_PER_SECOND, duration_seconds=seconds,
            begin_stream_seconds=0.0, end_stream_seconds=seconds, rotation=None, pixel_aspect_ratio=None,
        )  # fmt: skip

    def __len__(self) -> int:
        return int(self.metadata.num_frames)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.get_frames_at([range(len(self))[index]]).data[0]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(len(self)))

    def get_frames_at(self, indices: Sequence[int]) -> SimpleNamespace:
        """Read frames: an object with ``data``, uint8 of shape (n, 3, height, width)."""
        frames = () if self.video is None else self.video.frames  # only those that are asked for are read
        images = [VideoRef((frames[i],)).open()[0] if frames else Image.new("RGB", _BLANK) for i in map(int, indices)]
        chosen = [np.asarray(image.convert("RGB")) for image in images]
        seconds = torch.tensor([float(index) / _FRAMES_PER_SECOND for index in indices])
        data = torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2)
        return SimpleNamespace(data=data, pts_seconds=seconds, duration_seconds=torch.ones_like(seconds))

    def get_frames_in_range(self, start: int, stop: int, step: int = 1) -> SimpleNamespace:
        """Read a range of frames, see `get_frames_at`."""
        return self.get_frames_at(range(start, stop, step))


def stored_video(video: VideoRef | None, stand_in: ImageRef | None = None) -> StoredVideo:
    """Make the value of a column of a video: paths stay paths.

    Args:
        video: The video; None for none.
        stand_in: Image that foreign models see as a video of one frame where there is no video.

    Raises:
        ValueError: If it is a file or a decoder and not frames.
    """
    if video is None:
        return {"frames": [] if stand_in is None else [_stored(stand_in)], "num_frames": _NO_VIDEO}
    if not video.frames:
        raise ValueError(f"video {video.label}: a table holds videos as frames only")
    return {"frames": list(map(_stored, video.frames)), "num_frames": video.num_frames}


def video_of(value: StoredVideo | None) -> VideoRef | None:
    """Make a video of the value of a column, see `stored_video`.

    Args:
        value: The value; None for none.
    """
    return None if value is None or value["num_frames"] == _NO_VIDEO else _frames_of(value)


def _frames_of(value: StoredVideo) -> VideoRef:
    frames = tuple(ImageRef(path=frame["path"], data=frame["bytes"]) for frame in value["frames"])
    return VideoRef(frames, num_frames=value["num_frames"] or None)


def _stored(frame: ImageRef) -> StoredImage:
    if frame.path is not None and frame.member is None:
        return {"bytes": None, "path": frame.path}
    return {"bytes": frame.read(), "path": None}
