"""Stored outputs of an image or video processor, which are returned again instead of processing the same media."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

PLACEHOLDER = Image.new("RGB", (1, 1))
"""Image that inputs have instead of one whose output is stored."""


class StoredOutputs:
    """Image or video processor that records the outputs of another one, or returns stored ones; each thread its own.

    Args:
        processor: The other processor, which also has all other attributes.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._state = threading.local()

    def __reduce__(self) -> tuple[type[StoredOutputs], tuple[object]]:
        return type(self), (self._processor,)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._processor, name)

    @contextmanager
    def recording(self) -> Iterator[list[BatchFeature]]:
        """Record the outputs of this thread's calls in the list that is yielded."""
        self._state.recorded = []
        try:
            yield self._state.recorded
        finally:
            del self._state.recorded

    @contextmanager
    def playing(self, stored: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """Return these outputs, joined, for the calls of this thread."""
        self._state.stored = stored
        try:
            yield
        finally:
            del self._state.stored

    def __call__(self, media: object, **kwargs: object) -> BatchFeature:
        """Return what is played, else process the media and record the output."""
        stored = getattr(self._state, "stored", None)
        if stored is None:
            made: BatchFeature = self._processor(media, **kwargs)
            self._state.recorded.append(BatchFeature(dict(made)))
            return made
        return BatchFeature({name: _joined([one[name] for one in stored]) for name in stored[0]})


def _joined(parts: list[Any]) -> Any:
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else list(chain.from_iterable(parts))
