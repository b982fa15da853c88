"""Resident memory of this process: current, peak, and returning freed memory to the system."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any

import psutil


def resident() -> int:
    """Current resident memory of this process.

    Returns:
        int: Bytes.

    Example:
        >>> resident() > 1 << 20
        True
    """
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """Peak resident memory of this process.

    Returns:
        int: Bytes.

    Example:
        >>> peak_resident() > 1 << 20
        True
    """
    status = Path("/proc/self/status")  # ru_maxrss starts with that of the parent process
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def malloc_trim() -> bool:
    """Return freed memory that the C library keeps to the system.

    Buffers of all sizes that are freed between small ones that stay leave holes in the heap of every thread, which glibc
    keeps. A call takes milliseconds, and the next use of each page a page fault.

    Returns:
        bool: False on other C libraries than glibc, which have no such function.

    Example:
        >>> malloc_trim() == (_libc_malloc_trim() is not None)
        True
    """
    if (trim := _libc_malloc_trim()) is None:
        return False
    trim(0)
    return True


@cache
def _libc_malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
