"""Features of mini-batches that wait on disk for the second pass."""

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


class Spill:
    """Mini-batches in a nameless temporary file, which goes with the process.

    Each is written and read once: no folder to share and clean, as :class:`FeatureStore` needs for what is kept for good.

    Example:
        >>> spill = Spill()
        >>> spill.add(7, {"tokens": [torch.ones(2)], "kind": "image"})
        >>> 7 in spill, spill.read(7, torch.device("cpu"))
        (True, {'kind': 'image', 'tokens': [tensor([1., 1.])]})
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._indices: dict[int, tuple[int, int, Features]] = {}
        self._full = False

    def __contains__(self, number: int) -> bool:
        return number in self._indices

    def clear(self) -> None:
        """Forget all mini-batches."""
        self._indices.clear()
        if self._file is not None:
            self._file.seek(0)
            self._file.truncate()

    def add(self, number: int, features: Features) -> None:
        """Keep a mini-batch, or say once that the disk is full and keep none.

        Args:
            number: Of the mini-batch.
            features: Tensors, lists of tensors, and other things, which stay in memory.
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
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as this object
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            self._give_up(error)
            return
        self._indices[number] = (start, len(content), others)

    def _give_up(self, error: OSError) -> None:
        logger.warning(
            "visual tokens do not fit into %s (%s): images are decoded and seen twice a step. TMPDIR names another "
            "folder.",
            tempfile.gettempdir(),
            error,
        )
        self._full = True
        self._indices.clear()
        with suppress(OSError):  # it tries once more to write
            if self._file is not None:
                self._file.close()
        self._file = None

    def read(self, number: int, device: torch.device) -> Features:
        """Return a mini-batch as it was added.

        Args:
            number: Of the mini-batch.
            device: Where its tensors go.
        """
        start, length, others = self._indices[number]
        assert self._file is not None
        self._file.seek(start)
        features: dict[str, Any] = dict(others)
        for name, tensor in sorted(load(self._file.read(length)).items()):  # the parts of a list in their order
            whole, is_part, _ = name.partition("/")
            moved = tensor.to(device)
            if is_part:
                features.setdefault(whole, []).append(moved)
            else:
                features[name] = moved
        return features
