"""Input videos: shapes from headers, before any frame is decoded, and which videos are references."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple, TypeGuard

import numpy as np
import torch
from PIL import Image

from unime_st.data.image_urls import is_url
from unime_st.data.items import Item, VideoLike
from unime_st.data.videos import FrameDecoder, VideoRef, is_frame_list


class VideoShape(NamedTuple):
    """Frames of a video: their number, their stored width and height, and whether they are decoded one by one."""

    num_frames: int
    width: int
    height: int
    one_by_one: bool = True


def video_shapes(value: object) -> list[VideoShape]:
    """Shape of every video of a normalized input, from headers; URLs and arrays with metadata are left out.

    Stored frames and Pillow images are decoded one by one, those of files, decoders and arrays together.

    Raises:
        BadImageError: If a frame cannot be read, or frames differ in size.

    Example:
        >>> from PIL import Image
        >>> from unime_st.encoding.input_videos import video_shapes
        >>> video_shapes({"text": "a ship", "video": [Image.new("RGB", (4, 2))] * 3})
        [VideoShape(num_frames=3, width=4, height=2, one_by_one=True)]
    """
    if isinstance(value, Item):
        return _video_shapes(value.video)
    if isinstance(value, Mapping):
        return _video_shapes(value.get("video")) + video_shapes(value.get("content"))
    if isinstance(value, (list, tuple)):
        return [shape for part in value for shape in video_shapes(part)]
    return []


def _video_shapes(video: object) -> list[VideoShape]:
    """Shape of a video, or of each one of a list."""
    if isinstance(video, VideoRef):
        return [VideoShape(*video.shape(), one_by_one=bool(video.frames))]
    if is_frame_list(video):
        return [VideoShape(len(video), *video[0].size)] if isinstance(video[0], Image.Image) else []
    if isinstance(video, (list, tuple)):
        return [shape for part in video for shape in _video_shapes(part)]
    if isinstance(video, (np.ndarray, torch.Tensor)) and video.ndim == 4:
        height, width = video.shape[1:3] if video.shape[-1] == 3 else video.shape[2:]
        return [VideoShape(len(video), width, height, one_by_one=False)]
    return []


def has_video(value: object) -> bool:
    """Whether a normalized input, or one of several, has a video."""
    if isinstance(value, Item):
        return value.video is not None
    if isinstance(value, Mapping):
        return value.get("video") is not None or has_video(value.get("content"))
    return isinstance(value, (list, tuple)) and any(map(has_video, value))


def is_reference(video: object) -> TypeGuard[VideoLike]:
    """Whether a video is one of files or a decoder; frames in memory and URLs are passed on as they are."""
    if isinstance(video, (str, os.PathLike)):
        return not is_url(str(video))
    if is_frame_list(video):
        return not any(isinstance(frame, Image.Image) for frame in video)
    return isinstance(video, FrameDecoder)
