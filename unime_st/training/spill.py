"""Spill file: features of mini-batches kept in a temporary file until the second pass of gradient caching."""

from __future__ import annotations

import io
import logging
import os
import tempfile
from contextlib import suppress
from typing import IO

import torch
from accelerate.utils import send_to_device

from unime_st.encoding.model_inputs import Features

logger = logging.getLogger(__name__)


class SpillFile:
    """Features of mini-batches in an anonymous temporary file, which the system removes with the process.

    Unlike a :class:`~unime_st.training.feature_store.FeatureStore` it belongs to one process, and each mini-batch is
    written and read once.

    Example:
        >>> spill = SpillFile()
        >>> spill.add(7, {"tokens": [torch.ones(2)], "kind": "image"})
        >>> 7 in spill, spill.read(7, torch.device("cpu"))
        (True, {'tokens': [tensor([1., 1.])], 'kind': 'image'})
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._entries: dict[int, tuple[int, int]] = {}  # start and length in the file
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
        """Write a mini-batch of tensors and lists of tensors; on a full disk warn, and keep none from then on."""
        if self._full:
            return
        content = io.BytesIO()
        torch.save(send_to_device(dict(features), "cpu"), content)
        try:
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as this object
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(content.getbuffer())
            self._file.flush()
        except OSError as error:
            self._disable(error)
            return
        self._entries[number] = (start, content.getbuffer().nbytes)

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
        """Features of a mini-batch as they were added, on a device."""
        start, length = self._entries[number]
        assert self._file is not None
        self._file.seek(start)
        features: Features = torch.load(io.BytesIO(self._file.read(length)), map_location=device, weights_only=True)
        return features
