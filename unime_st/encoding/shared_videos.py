"""Shared videos: frames that several inputs of a window have are decoded and pass the vision tower once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import BatchFeature

from unime_st.backbones.video_tokens import VIDEO_PIXELS, compute_video_tokens, video_output
from unime_st.backbones.visual_outputs import backbone_of, takes_visual_tokens
from unime_st.data.items import Item
from unime_st.data.videos import VideoRef, is_frame_list
from unime_st.encoding.model_inputs import Features, load_input
from unime_st.encoding.replicas import with_processor
from unime_st.encoding.stored_outputs import PLACEHOLDER, StoredOutputs

RunTower = Callable[[Features], list[torch.Tensor]]
"""Runs the vision tower on the features of a video; see :func:`~unime_st.backbones.video_tokens.compute_video_tokens`."""


class SharedVideo:
    """A video of several inputs: its visual tokens and the output of the video processor, until the last input is done.

    Args:
        video: The video, or its frames in memory.
        uses: Number of inputs that have it.
    """

    def __init__(self, video: object, uses: int) -> None:
        self.video, self.uses = video, uses
        self.processed: BatchFeature | None = None
        self.layers: list[torch.Tensor] = []
        self.lock = threading.Lock()

    def release(self) -> None:
        """Count one input as done; the tokens are dropped with the last one."""
        with self.lock:
            self.uses -= 1
            if self.uses <= 0:
                self.processed, self.layers = None, []


def video_of(value: object) -> object:
    """The video of a normalized input, None if there is none."""
    return _parts(value).get("video")


def video_key(value: object) -> Hashable | None:
    """Key that inputs have in common if they have the same video; None without a video or with an image or audio, too.

    Example:
        >>> from unime_st.encoding.shared_videos import video_key
        >>> video_key({"text": "a ship"}) is None
        True
    """
    parts = _parts(value)
    if not parts.keys() <= {"text", "video"} or not isinstance(parts.get("text"), str | None):
        return None
    video = parts.get("video")
    if isinstance(video, VideoRef):
        return video if isinstance(video.decoder, Hashable) else None
    if is_frame_list(video):
        return tuple(map(id, video))  # of objects that the inputs keep alive
    return id(video) if isinstance(video, (torch.Tensor, np.ndarray)) else None


def _parts(value: object) -> Mapping[str, object]:
    """Parts of a normalized input in their order, which matters to chat templates; none of a text or a chat."""
    if isinstance(value, Item):
        parts = {"image": value.image, "video": value.video, "text": value.text}
        return {name: part for name, part in parts.items() if part is not None}
    return value if isinstance(value, Mapping) else {}


class VideoSharing:
    """Makes features of inputs whose videos are shared, with visual tokens instead of frames.

    Args:
        model: The embedding model.
        prompting: Options of ``preprocess``.
    """

    def __init__(self, model: SentenceTransformer, prompting: Mapping[str, Any]) -> None:
        self.model, self.prompting = model, prompting
        self.base = backbone_of(model)
        self._outputs = StoredOutputs(getattr(getattr(model[0], "processor", None), "video_processor", None))
        self._twin = with_processor(model, self._with_outputs)

    @property
    def applies(self) -> bool:
        """Whether the model takes visual tokens that were computed before."""
        return takes_visual_tokens(self.base) and hasattr(self.base, "get_video_features")

    def _with_outputs(self, processor: Any) -> Any:
        processor.video_processor = self._outputs
        return processor

    def load(self, shared: SharedVideo, run_tower: RunTower) -> None:
        """Decode a video and compute its visual tokens unless another thread has.

        Raises:
            ValueError: If it cannot be decoded (BadImageError included).
        """
        with shared.lock:
            if shared.processed is not None:
                return
            with self._outputs.recording() as recorded:
                features = self._twin.preprocess([load_input({"video": shared.video})], **self.prompting)
            (processed,) = recorded
            shared.layers = run_tower(features)
            pixels = processed[VIDEO_PIXELS]
            processed[VIDEO_PIXELS] = torch.zeros(()).expand(1, *pixels.shape[1:])  # only its shape is needed again
            shared.processed = processed

    def features(self, inputs: Sequence[object], videos: Sequence[SharedVideo]) -> Features:
        """Features of inputs with these videos, one each, which have been loaded."""
        layers = [torch.cat(layer) for layer in zip(*(video.layers for video in videos), strict=True)]
        processed = [video.processed for video in videos if video.processed is not None]
        placeholders = [{**_parts(value), "video": [PLACEHOLDER]} for value in inputs]
        with self._outputs.playing(processed):
            features = self._twin.preprocess(placeholders, **self.prompting)
        features.pop(VIDEO_PIXELS)
        features["mm_encoder_outputs"] = {"video": video_output(self.base, layers)}
        return features

    def run_tower(self, features: Features) -> list[torch.Tensor]:
        """Visual tokens of the videos of features on the device of the model."""
        return compute_video_tokens(self.base, features)
