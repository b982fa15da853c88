"""Memory of this process."""

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
    """Resident memory of this process.

    Returns:
        int: Bytes.

    Example:
        >>> resident() > 1 << 20
        True
    """
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """Highest resident memory of this process so far.

    Returns:
        int: Bytes.

    Example:
        >>> peak_resident() > 1 << 20
        True
    """
    status = Path("/proc/self/status")  # ru_maxrss would begin with that of the process that started this one
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def malloc_trim() -> bool:
    """Hand freed memory that the C library keeps back to the system.

    Buffers of all sizes that come and go between small things that stay leave holes in the heap of every thread; glibc
    keeps them. Takes some milliseconds, and the next use of each page its first touch.

    Returns:
        bool: Whether that was possible: of the C libraries only glibc has, and needs, it.

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
