"""Spill file: features of mini-batches kept in a temporary file until the second pass of gradient caching."""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import suppress
from typing import IO, Any

import torch
from safetensors.torch import load, save

from unime_st.training.feed import Features

logger = logging.getLogger(__name__)


class SpillFile:
    """Features of mini-batches in an anonymous temporary file, which the system removes with the process.

    Unlike a :class:`~unime_st.training.feature_store.FeatureStore` it belongs to one process, and each mini-batch is
    written and read once.

    Example:
        >>> spill = SpillFile()
        >>> spill.add(7, {"tokens": [torch.ones(2)], "kind": "image"})
        >>> 7 in spill, spill.read(7, torch.device("cpu"))
        (True, {'kind': 'image', 'tokens': [tensor([1., 1.])]})
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._entries: dict[int, tuple[int, int, Features]] = {}  # start, length, values in memory
        self._full = False

    def __contains__(self, number: int) -> bool:
        return number in self._entries

    def clear(self) -> None:
        """Drop all mini-batches."""
        self._entries.clear()
        if self._file is not None:
            self._file.seek(0)
            self._file.truncate()

    def add(self, number: int, features: Features) -> None:
        """Write a mini-batch. On a full disk log a warning, and from then on keep none.

        Args:
            number: Number of the mini-batch.
            features: Tensors, lists of tensors, and other values, which stay in memory.
        """
        if self._full:
            return
        tensors: dict[str, torch.Tensor] = {}
        others: Features = {}
        for name, value in features.items():
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
                tensors |= {f"{name}/{index:04d}": tensor for index, tensor in enumerate(value)}
            else:
                others[name] = value
        content = save({n: tensor.detach().to("cpu", copy=True).contiguous() for n, tensor in tensors.items()})
        try:
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as this object
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            self._disable(error)
            return
        self._entries[number] = (start, len(content), others)

    def _disable(self, error: OSError) -> None:
        logger.warning(
            "visual tokens do not fit into %s (%s): images are decoded and encoded twice a step. Set TMPDIR to use "
            "another folder.",
            tempfile.gettempdir(),
            error,
        )
        self._full = True
        self._entries.clear()
        with suppress(OSError):  # closing tries once more to write
            if self._file is not None:
                self._file.close()
        self._file = None

    def read(self, number: int, device: torch.device) -> Features:
        """Return the features of a mini-batch.

        Args:
            number: Number of the mini-batch.
            device: Device of the tensors.

        Returns:
            dict: The features as they were added.
        """
        start, length, others = self._entries[number]
        assert self._file is not None
        self._file.seek(start)
        features: dict[str, Any] = dict(others)
        for name, tensor in sorted(load(self._file.read(length)).items()):  # parts of a list in their order
            whole, is_part, _ = name.partition("/")
            moved = tensor.to(device)
            if is_part:
                features.setdefault(whole, []).append(moved)
            else:
                features[name] = moved
        return features
