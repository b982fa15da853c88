"""Data sets that lie in a folder of the user's."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "UNIME_EVAL_DIR"
LOCAL = "local-"
"""What the revision of data in a folder of the user's begins with."""


def evaluation_folder(*names: str) -> Path:
    """Find a data set below ``$UNIME_EVAL_DIR``.

    Args:
        *names: Names the data set's folder may have.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If the variable is not set or there is no such folder.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if not named:
        raise FileNotFoundError(f"set {FOLDER_VARIABLE} to the folder that holds {names[0]}/ (see docs/evaluation.md)")
    for parent in (Path(named).expanduser(), Path(named).expanduser() / "retrieval"):
        for name in names:
            if (parent / name).is_dir():
                return parent / name
    raise FileNotFoundError(f"{FOLDER_VARIABLE}={named} has no folder {' or '.join(names)}")


def state(folder: Path) -> str:
    """Digest of the names, sizes and times of change of all files in a folder.

    Args:
        folder: Any folder.

    Returns:
        12 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        found = file.stat()
        digest.update(f"{file.relative_to(folder)} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def localised(metadata: Any, revision: str) -> Any:
    """Metadata of a task for data in a folder.

    Args:
        metadata: Metadata of the class.
        revision: Digest of the data.

    Returns:
        A copy whose revision and subset names carry the digest: mteb evaluates again when a subset has no result yet,
        so it never takes a score of other data for this one's.
    """
    subsets = metadata.eval_langs if isinstance(metadata.eval_langs, dict) else {"": metadata.eval_langs}
    tag = f"{LOCAL}{revision}"
    names = {f"{subset}-{tag}" if subset else tag: languages for subset, languages in subsets.items()}
    return metadata.model_copy(update={"dataset": {**metadata.dataset, "revision": tag}, "eval_langs": names})
