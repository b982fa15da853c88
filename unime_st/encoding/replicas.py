"""Copies of a model that several threads may use at once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer


def shared_by_threads(model: SentenceTransformer) -> SentenceTransformer:
    """Return a model with the same weights whose tokenizer is used by one thread at a time.

    A fast tokenizer keeps its truncation and padding in itself, and every call may change them, so two threads would
    disturb each other. Images, which are what costs, are processed side by side.

    Args:
        model: Any Sentence Transformers model; it stays as it is.

    Returns:
        SentenceTransformer: Of the same class.
    """
    return with_processor(model, _taking_turns)


def with_processor(model: SentenceTransformer, changed: Callable[[Any], Any]) -> SentenceTransformer:
    """Return a model with the same weights and another processor.

    Args:
        model: Any Sentence Transformers model; it stays as it is.
        changed: Gets a shallow copy of the processor, and returns what takes its place.

    Returns:
        SentenceTransformer: Of the same class.
    """
    twin = copy.copy(model)
    twin.__dict__["_modules"] = modules = dict(model._modules)
    name = next(iter(modules))
    first: Any = copy.copy(model[0])
    if getattr(first, "processor", None) is None:
        return twin
    modules[name] = first
    first.processor = changed(copy.copy(first.processor))
    if getattr(first, "input_formatter", None) is not None:
        first.input_formatter = copy.copy(first.input_formatter)
        first.input_formatter.processor = first.processor
    return twin


def _taking_turns(twin: Any) -> Any:
    if getattr(twin, "tokenizer", None) is not None:
        twin.tokenizer = _taking_turns(copy.copy(twin.tokenizer))
    elif hasattr(twin, "encode") and callable(twin):
        twin.__class__ = _locked(type(twin))
    return twin


def _locked(kind: type) -> type:
    """Subclass of a tokenizer class with a lock around whatever reaches its backend."""
    lock = threading.RLock()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with lock:
            return kind.__call__(self, *args, **kwargs)  # type: ignore[operator]

    def encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        with lock:
            return kind.encode(self, *args, **kwargs)  # type: ignore[attr-defined]

    return type(kind.__name__, (kind,), {"__call__": call, "encode": encode, "__module__": kind.__module__})


def on_devices(model: SentenceTransformer, devices: list[torch.device]) -> list[SentenceTransformer]:
    """Return the model on every device; the first keeps the weights, others get copies.

    Args:
        model: The model; it moves to the first device.
        devices: Where to.

    Returns:
        list[SentenceTransformer]: One for each device.
    """
    model.to(devices[0])
    found = [model]
    for device in devices[1:]:
        if device == devices[0]:
            found.append(model)
            continue
        found.append(copy.deepcopy(model).to(device))
    return found
