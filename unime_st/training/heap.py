"""Keeps the memory of freed buffers from piling up over the mini-batches of a large batch."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

import psutil

_SLACK = 32 << 20


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Of glibc: hands free pages back to the system. Other C libraries have none, and need it less."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class Heap:
    """Watches the resident memory of a step, and gives freed memory back where more and more of it is kept.

    Pictures of all sizes, their pixels and activations come and go, small things that stay (embeddings, kernels, random
    states) lie between them, and glibc's heap grows although the sum of what is in use does not: by hundreds of MiB in
    a batch of a few hundred pictures. Handing pages back costs their first touch, so it is done only where more is kept
    than after the first mini-batch, which is the largest.

    Args:
        slack: Bytes that may be kept beyond those after the first mini-batch of a kind. Defaults to 32 MiB.

    Example:
        >>> from unime_st.training.heap import Heap
        >>> heap = Heap()
        >>> heap.begin()
        >>> heap.tidy("forward")
        False
    """

    def __init__(self, slack: int = _SLACK) -> None:
        self._slack, self._begun = slack, 0
        self._usual: dict[str, int] = {}
        self._last: str | None = None

    def begin(self) -> None:
        """Start a step with what is in use."""
        if (trim := _malloc_trim()) is not None:
            trim(0)
        self._begun, self._last = _resident(), None
        self._usual.clear()

    def tidy(self, kind: str, kept: int = 0) -> bool:
        """Call before a mini-batch, when nothing of the one before is in use.

        Args:
            kind: Of the mini-batch that is to come; those of one kind come by falling size.
            kept: Bytes that are kept on purpose since the step began.

        Returns:
            Whether memory was given back.
        """
        last, self._last = self._last, kind
        trim = _malloc_trim()
        if trim is None or last is None:
            return False
        above = _resident() - self._begun - kept
        usual = self._usual.setdefault(last, above)
        if above <= max(usual, *self._usual.values()) + self._slack:
            return False
        trim(0)
        return True


def _resident() -> int:
    return psutil.Process().memory_info().rss
