"""Memory of this process."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


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
