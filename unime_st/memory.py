"""Memory of this process: current, peak, how freed memory is returned to the system, and the end of the process."""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil


def resident() -> int:
    """Current resident memory of this process in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")  # ru_maxrss starts with that of the parent process
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def malloc_trim() -> bool:
    """Return freed memory that the C library keeps to the system; False on other C libraries than glibc.

    Buffers of all sizes that are freed between small ones that stay leave holes in the heap of every thread, which
    glibc keeps. A call takes milliseconds, and the next use of each page a page fault.
    """
    if (trim := _libc_malloc_trim()) is None:
        return False
    trim(0)
    return True


@cache
def _libc_malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


_exit_status: list[int] = []


@cache
def prepare_exit() -> None:
    """Register the exit function of :func:`leave_quickly`, which runs after those that are registered later."""
    atexit.register(_leave)


def leave_quickly(status: int) -> None:
    """Let the process end without freeing its objects, once all exit functions have run.

    For interrupted commands: with torch, transformers and a model loaded, the interpreter searches its objects for
    reference cycles for 3 seconds, and for several times that on a busy machine.

    Args:
        status: Exit status; a negative one is the signal that ends the process.
    """
    prepare_exit()
    _exit_status[:] = [status]


def _leave() -> None:
    for status in _exit_status:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, or none
                stream.flush()
        if status < 0:
            signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
        os._exit(status)


class HeapTrimmer:
    """Keeps resident memory flat over the mini-batches of a large batch, by calling :func:`malloc_trim` where it helps.

    Decoded images, pixels and activations of all sizes are freed between small allocations that stay (embeddings,
    random states). glibc's heap then grows by hundreds of MiB over a few hundred images, although the memory in use
    does not. Trimming costs page faults afterwards. So it is done between the passes of a step only, and where more
    memory is kept than one mini-batch leaves behind on a trimmed heap.

    Args:
        slack: Bytes that may be kept beyond those of one mini-batch. Defaults to 16 MiB.

    Example:
        >>> trimmer = HeapTrimmer()
        >>> trimmer.begin()
        >>> trimmer.trim("forward")
        False
    """

    def __init__(self, slack: int = 16 << 20) -> None:
        self._slack = slack
        self._at_begin = self._usual = 0
        self._trimmed = False
        self._last: str | None = None

    def begin(self) -> None:
        """Start a step: trim, and measure the memory in use."""
        self._trimmed = malloc_trim()
        self._at_begin, self._usual, self._last = resident(), 0, None

    def trim(self, kind: str, kept: int = 0) -> bool:
        """Trim if needed, and return whether memory was returned. Call it before each mini-batch.

        Nothing of the last mini-batch may be in use. ``kind`` is the pass of the next one, such as "forward", and
        ``kept`` the bytes kept on purpose since the step began.
        """
        last, self._last = self._last, kind
        if last is None:
            return False
        growth = resident() - self._at_begin - kept
        if self._trimmed:
            self._usual = max(self._usual, growth)
        self._trimmed = (kind != last or growth > self._usual + self._slack) and malloc_trim()
        return self._trimmed
