"""Model aliases and the folders they stand for on this machine: ``$UNIME_HOME`` and the packaged ``unime-tiny``."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

TINY = "unime-tiny"
PACKAGED = Path(__file__).parent / "models" / "unime-tiny"
"""Folder of ``unime-tiny`` inside this package."""
RESERVED_PREFIX = "unime-"
"""Names that begin like this are aliases, whether or not they stand for a folder."""
ALIAS_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class AliasError(OSError):
    """A model name without a usable folder; the message says which command makes one."""


def home() -> Path:
    """Folder of converted models and caches: ``$UNIME_HOME`` if set, else ``unime`` in the user's cache directory."""
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

    Raises:
        AliasError: It does not begin with a letter or digit, or has other characters than letters, digits, ``.``,
            ``_`` and ``-``, so it could leave ``$UNIME_HOME/models``.

    Example:
        >>> check_alias("unime-v2-2b")
        'unime-v2-2b'
    """
    if not ALIAS_PATTERN.fullmatch(name):
        raise AliasError(f"{name!r} cannot be an alias: use letters, digits, '.', '_' and '-', e.g. 'unime-v2-2b'.")
    return name


def local_folder(name: str) -> Path:
    """Folder that ``unime pull`` and ``unime convert --alias`` write for an alias, whether or not it exists.

    Example:
        >>> local_folder("unime-v2").parts[-2:]
        ('models', 'unime-v2')
    """
    return home() / "models" / check_alias(name)


def local_aliases() -> list[str]:
    """Aliases of the folders in ``$UNIME_HOME/models``, sorted."""
    models = home() / "models"
    folders = [path for path in models.iterdir() if path.is_dir()] if models.is_dir() else []
    return sorted(path.name for path in folders if ALIAS_PATTERN.fullmatch(path.name))


def alias_of(folder: str | Path) -> str | None:
    """Alias that stands for a folder, the inverse of :func:`find_model`; None if there is none.

    Example:
        >>> alias_of(PACKAGED), alias_of("somewhere/else")
        ('unime-tiny', None)
    """
    path = Path(folder).resolve()
    if path == PACKAGED.resolve():
        return TINY
    return path.name if path.parent == (home() / "models").resolve() and ALIAS_PATTERN.fullmatch(path.name) else None


def find_model(name: str) -> Path | None:
    """Find a model by the path of its folder or an alias, without going to the hub.

    Returns:
        The first that exists of: a directory of that name, ``$UNIME_HOME/models/<name>``, the model inside this
        package (``unime-tiny``); None if there is none.

    Raises:
        AliasError: The folder of an alias is damaged; the message says how to make it again.

    Example:
        >>> find_model("unime-tiny").name
        'unime-tiny'
    """
    if Path(name).is_dir():
        return Path(name)
    if not ALIAS_PATTERN.fullmatch(name):
        return None
    folder = local_folder(name)
    if not folder.is_dir():
        if name != TINY:
            return None
        folder = PACKAGED
    _check_folder(folder, name)
    return folder


def _check_folder(folder: Path, name: str) -> None:
    if not (folder / "modules.json").is_file():
        how = f"`unime pull {name}`" if name != TINY else "`pip install --force-reinstall unime-st`"
        what = "is not a Sentence Transformers folder" if folder.is_dir() else "is missing"
        raise AliasError(f"{name!r} stands for {folder}, which {what} (no modules.json). Make it again: {how}.")
    broken = [path.name for path in folder.glob("*.safetensors") if not path.exists()]
    if broken:
        raise AliasError(
            f"{name!r} stands for {folder}, whose weights link to files that are gone ({', '.join(broken)}). "
            f"Make it again with `unime pull {name}` or `unime convert FOLDER --alias {name} --overwrite`."
        )


def adapter_base(folder: str | Path) -> str | None:
    """Base model that the adapter in a folder names; None without an adapter, or with a whole model beside it.

    Example:
        >>> adapter_base(PACKAGED) is None
        True
    """
    path = Path(folder)
    if (path / "config.json").is_file() or not (path / "adapter_config.json").is_file():
        return None
    base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    return base if isinstance(base, str) else None
