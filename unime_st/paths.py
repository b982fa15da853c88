"""Folders and aliases: where models and caches lie on this machine, and which names stand for them."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

TINY = "unime-tiny"
PACKAGED = Path(__file__).parent / "models" / "unime-tiny"
"""Folder of ``unime-tiny`` inside this package."""
RESERVED_PREFIX = "unime-"
ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class AliasError(OSError):
    """A model name that stands for no usable folder; the message says which command makes one."""


def home() -> Path:
    """Folder for converted models and caches.

    Returns:
        ``$UNIME_HOME`` when set, else ``unime`` in the cache directory of the user.

    Example:
        >>> home().name != ""
        True
    """
    if named := os.environ.get("UNIME_HOME"):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "unime"


def check_alias(name: str) -> str:
    """Return ``name`` if it can serve as an alias.

    Args:
        name: Letters, digits, ``.``, ``_`` and ``-``, beginning with a letter or digit.

    Raises:
        AliasError: The name has other characters, so it could leave ``$UNIME_HOME/models``.

    Example:
        >>> check_alias("unime-v2-2b")
        'unime-v2-2b'
    """
    if not ALIAS.fullmatch(name):
        raise AliasError(f"{name!r} cannot be an alias: use letters, digits, '.', '_' and '-', e.g. 'unime-v2-2b'.")
    return name


def local_folder(name: str) -> Path:
    """Folder that ``unime pull`` and ``unime convert --alias`` write for an alias, whether or not it exists.

    Args:
        name: An alias, see :func:`check_alias`.

    Returns:
        ``$UNIME_HOME/models/<name>``.

    Example:
        >>> local_folder("unime-v2").parts[-2:]
        ('models', 'unime-v2')
    """
    return home() / "models" / check_alias(name)
