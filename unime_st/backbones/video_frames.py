"""Video frames for the processors of video models: Pillow resizes each frame, and no frame is sampled or left out.

transformers resizes videos with torchvision, whose results differ from those of the released evaluation code of MMEB-V2
(VLM2Vec-V2, arXiv:2507.04590). Here each frame is resized by Pillow (bicubic) first, and the video processor of the
model only normalizes and cuts patches: pairs of frames, of which the last is repeated if their number is odd.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from unime_st.data.images import MAX_ASPECT, BadImageError, decoding, label_of

VIDEO_FAMILIES = "Qwen2-VL, Qwen2.5-VL, Qwen3-VL and LLaVA-OneVision"

_SMALL_SIDE = 28
"""A frame with a side below this becomes a square of its longer side."""

_FRAMES_PER_SECOND = 2.0
"""Rate that Qwen3-VL is told for frames without times, as qwen-vl-utils does for lists of frames."""

_PAIR = 2
"""Frames that are cut into patches together."""


@dataclass(frozen=True)
class FrameLimits:
    """How many pixels a frame has after it is resized; it keeps its shape.

    Args:
        min_pixels: Fewest pixels of a frame.
        max_pixels: Most pixels of a frame.
        total_pixels: Most pixels of a video of which a pair of frames counts once, as in qwen-vl-utils; 0 for no limit.

    Example:
        >>> FrameLimits(3136, 1003520).frame_size(8, (1920, 1080), 28)
        (1316, 728)
        >>> FrameLimits(3136, 1003520).frame_size(8, (20, 120), 28)
        (112, 112)
    """

    min_pixels: int
    max_pixels: int
    total_pixels: int = 0

    def frame_size(self, count: int, size: tuple[int, int], factor: int) -> tuple[int, int]:
        """Width and height in pixels to resize frames to.

        Args:
            count: Number of frames of the video.
            size: Width and height of the stored frames.
            factor: Side in pixels of the square that becomes one token.
        """
        width, height = size
        if min(size) < _SMALL_SIDE or max(size) > MAX_ASPECT * min(size):
            width = height = max(size)
        most = self.max_pixels
        if self.total_pixels:
            share = self.total_pixels // count * _PAIR
            most = max(min(most, share), int(1.05 * self.min_pixels))
        return _smart_size(width, height, factor, self.min_pixels, most)


UNIME_LIMITS = FrameLimits(4 * 28 * 28, 1280 * 28 * 28)
"""Limits of models whose recipe has an image rule: those of VLM2Vec-V2."""


def accepts_video(processor: object, template: str | None = None) -> bool:
    """Whether a processor is of a family with a video slot here, and the chat template (default: its own) has the slot.

    Example:
        >>> accepts_video(None)
        False
    """
    template = template or getattr(processor, "chat_template", None)
    return _kind(getattr(processor, "video_processor", None)) is not None and "video" in str(template)


def raise_without_video(processor: object, template: str | None = None) -> None:
    """Raise a ValueError for a model without a video slot, which would be given the text of an item only."""
    if not accepts_video(processor, template):
        raise ValueError(
            f"this model ({type(processor).__name__.removesuffix('Processor')}) takes no video: use one of the "
            f"families {VIDEO_FAMILIES}, whose chat template has a video slot (convert folders of earlier versions again)"
        )


def stacks_videos(processor: object) -> bool:
    """Whether a processor puts the videos of a batch in one tensor, so that they need equally many frames.

    Example:
        >>> stacks_videos(None)
        False
    """
    return _kind(getattr(processor, "video_processor", None)) == "llava"


def resize_frames(processor: Any, limits: FrameLimits | None = None) -> Any:
    """Let a processor resize the frames of videos as this module does.

    Args:
        processor: Processor of a model, changed in place; without a video slot it stays as it is. Its video processor
            is replaced by a copy.
        limits: Sizes of frames. Defaults to None, those of the checkpoint or those set before.

    Returns:
        The processor.
    """
    videos = getattr(processor, "video_processor", None)
    kind = _kind(videos)
    if kind is None or (limits is None and isinstance(videos, _ResizedFrames)):
        return processor
    base = videos.base_class if isinstance(videos, _ResizedFrames) else type(videos)
    processor.video_processor = _with_frames(base, dict(vars(videos)), limits)
    return processor


def video_tokens(processor: Any, shape: tuple[int, int, int]) -> int:
    """Number of tokens of the frames of a video.

    Args:
        processor: Processor after :func:`resize_frames`.
        shape: Number of frames, and their stored width and height.
    """
    videos, (count, *size) = processor.video_processor, shape
    if _kind(videos) == "llava":
        side = math.ceil(math.isqrt(processor.num_image_tokens) / 2)
        return count * side**2 + 1
    width, height = videos.frame_size(count, (size[0], size[1]))
    return -(-count // videos.temporal_patch_size) * (width * height) // (videos.patch_size * videos.merge_size) ** 2


def times_of_frames(processor: Any, count: int) -> str:
    """Text that a processor puts between the frames of a video: the times of Qwen3-VL with their marks."""
    if _kind(processor.video_processor) != "qwen3":
        return ""
    marks = processor.vision_start_token + processor.vision_end_token
    last = count - 1
    pairs = [(first + min(first + 1, last)) / 2 for first in range(0, count, _PAIR)]
    return "".join(f"<{pair / _FRAMES_PER_SECOND:.1f} seconds>{marks}" for pair in pairs)


VIDEO_PROCESSORS = {
    "Qwen2VLVideoProcessor": "qwen2",
    "Qwen3VLVideoProcessor": "qwen3",
    "LlavaOnevisionVideoProcessor": "llava",
}
"""Row of size rules by the class of a video processor."""


def _kind(videos: object) -> str | None:
    """Row of size rules for a video processor; by name, because importing transformers' classes takes a second."""
    names = (base.__name__ for base in getattr(videos, "base_class", type(videos)).__mro__)
    return next((VIDEO_PROCESSORS[name] for name in names if name in VIDEO_PROCESSORS), None)


class _ResizedFrames:
    """Mixin for a video processor of transformers: frames are resized by Pillow, and none is sampled."""

    base_class: type
    limits: FrameLimits | None
    size: Any
    patch_size: int
    temporal_patch_size: int
    merge_size: int

    def preprocess(self, videos: object, **kwargs: object) -> object:
        found = list(flat_videos(videos))
        stock: Callable[..., object] = super().preprocess  # type: ignore[misc]
        if any(isinstance(video, str) for video in found):
            return stock(videos, **kwargs)
        prepared = [self._resized(video) for video in found]
        if _kind(self) == "llava" and len(counts := {len(video) for video in prepared}) > 1:
            raise BadImageError(
                f"LLaVA-OneVision stacks the videos of a batch, and these have {sorted(counts)} frames: sample equally many "
                "of each (VideoRef, num_frames)"
            )
        kwargs |= {"do_resize": False, "do_sample_frames": False}
        if _kind(self) != "llava":
            kwargs["cap_pixels_per_frame"] = False
        if _kind(self) == "qwen3" and kwargs.get("video_metadata") is None:
            kwargs["video_metadata"] = [
                {"fps": _FRAMES_PER_SECOND, "total_num_frames": len(video), "frames_indices": list(range(len(video)))}
                for video in prepared
            ]
        return stock(prepared, **kwargs)

    def frame_size(self, count: int, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height to resize frames to, from their number and their stored width and height."""
        if _kind(self) == "llava":
            return int(self.size["width"]), int(self.size["height"])
        factor = self.patch_size * self.merge_size
        least, most = int(self.size["shortest_edge"]), int(self.size["longest_edge"])
        if self.limits is None and _kind(self) == "qwen3":  # limits of the whole video
            even = count + count % _PAIR
            return FrameLimits(-(-least // even), most // even).frame_size(even, size, factor)
        return (self.limits or FrameLimits(least, most)).frame_size(count, size, factor)

    def _resized(self, video: list[Image.Image] | tuple[Image.Image, ...] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """Frames of a video as uint8 of shape (n, 3, height, width)."""
        frames = video if isinstance(video, (list, tuple)) else _images(video)
        if len(sizes := {frame.size for frame in frames}) > 1:
            raise BadImageError(f"the frames of a video differ in size: {sorted(sizes)}")
        size = self.frame_size(len(frames), frames[0].size)
        arrays = []
        for frame in frames:
            with decoding(label_of(frame)):
                rgb = _without_pixels(frame).convert("RGB")
                arrays.append(np.asarray(rgb if rgb.size == size else rgb.resize(size, Image.Resampling.BICUBIC)))
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return _with_frames, (self.base_class, dict(vars(self)), self.limits)


def _with_frames(base: type, state: dict[str, object], limits: FrameLimits | None) -> object:
    """Video processor of a subclass that has the name of its base, under which transformers stores it."""
    made: object = object.__new__(_class_with_frames(base, limits))
    vars(made).update(state)
    return made


@lru_cache(maxsize=64)
def _class_with_frames(base: type, limits: FrameLimits | None) -> type:
    members = {"base_class": base, "limits": limits, "__module__": base.__module__}
    return type(base.__name__, (_ResizedFrames, base), members)


def flat_videos(videos: Any) -> Iterator[Any]:
    """The videos of a batch, which may be nested by rows; a list of Pillow images is one video."""
    if isinstance(videos, (list, tuple)) and not (videos and isinstance(videos[0], Image.Image)):
        for video in videos:
            yield from flat_videos(video)
    elif isinstance(videos, (np.ndarray, torch.Tensor)) and videos.ndim == 5:
        yield from videos
    else:
        yield videos


def _images(video: np.ndarray | torch.Tensor) -> list[Image.Image]:
    """Frames of an array of shape (n, height, width, 3) or (n, 3, height, width)."""
    array = video.numpy(force=True) if isinstance(video, torch.Tensor) else video
    if array.shape[-1] != 3:
        array = np.moveaxis(array, 1, -1)
    return [Image.fromarray(np.ascontiguousarray(frame, dtype=np.uint8)) for frame in array]


def _without_pixels(frame: Image.Image) -> Image.Image:
    """A stored frame opened again, so that the pixels are dropped with it and not kept by the list of frames."""
    source = getattr(frame, "fp", None)
    return Image.open(source) if isinstance(source, io.BytesIO) else frame


def _smart_size(width: int, height: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Nearest multiples of the factor, halves to even, scaled into the limits; the rule of the Qwen-VL family."""
    wide, high = round(width / factor) * factor, round(height / factor) * factor
    if wide * high > most:
        scale = math.sqrt(height * width / most)
        wide, high = (max(factor, math.floor(side / scale / factor) * factor) for side in (width, height))
    elif wide * high < least:
        scale = math.sqrt(least / (height * width))
        wide, high = (math.ceil(side * scale / factor) * factor for side in (width, height))
    return wide, high
