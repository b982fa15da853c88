"""Model replicas: copies that share weights for use in threads, and copies on several devices."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from unime_st.backbones.video_frames import resize_frames


def shared_by_threads(model: SentenceTransformer) -> SentenceTransformer:
    """Model with the same weights whose tokenizer is protected by a lock; the given one is not modified.

    A fast tokenizer stores truncation and padding as state that every call may change, so concurrent calls would
    interfere. Images, which dominate the cost, are still processed concurrently. Frames of videos are resized as in
    :mod:`unime_st.backbones.video_frames`.
    """
    return with_processor(model, lambda processor: resize_frames(_with_lock(processor)))


def with_processor(model: SentenceTransformer, change: Callable[[Any], object]) -> SentenceTransformer:
    """Model with the same weights and another processor, which ``change`` makes of a shallow copy of its own."""
    twin = copy.copy(model)
    twin.__dict__["_modules"] = modules = dict(model._modules)
    name = next(iter(modules))
    first: Any = copy.copy(model[0])
    if getattr(first, "processor", None) is None:
        return twin
    modules[name] = first
    first.processor = change(copy.copy(first.processor))
    if getattr(first, "input_formatter", None) is not None:
        first.input_formatter = copy.copy(first.input_formatter)
        first.input_formatter.processor = first.processor
    return twin


def _with_lock(processor: Any) -> Any:
    if getattr(processor, "tokenizer", None) is not None:
        processor.tokenizer = _with_lock(copy.copy(processor.tokenizer))
    elif hasattr(processor, "encode") and callable(processor):
        processor.__class__ = _locked_class(type(processor))
    return processor


def _locked_class(kind: type) -> type:
    """Subclass of a tokenizer class with a lock around the calls that reach its backend."""
    lock = threading.RLock()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with lock:
            return kind.__call__(self, *args, **kwargs)  # type: ignore[operator]

    def encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        with lock:
            return kind.encode(self, *args, **kwargs)  # type: ignore[attr-defined]

    return type(kind.__name__, (kind,), {"__call__": call, "encode": encode, "__module__": kind.__module__})


def on_devices(model: SentenceTransformer, devices: list[torch.device]) -> list[SentenceTransformer]:
    """Replicate a model on several devices: the model itself, moved to the first device, and copies on the others."""
    model.to(devices[0])
    found = [model]
    for device in devices[1:]:
        if device == devices[0]:
            found.append(model)
            continue
        found.append(copy.deepcopy(model).to(device))
    return found
