"""Resumption: checkpoints that are whole, by a list of their files with sizes and digests."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from unime_st.files import file_digests, write_json

logger = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in the output folder of a stage."""
FILES = "files.json"
_STATE = "trainer_state.json"


def seal_checkpoint(folder: Path) -> None:
    """Write the list of the files of a finished checkpoint."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != FILES]
    names = [path.relative_to(folder).as_posix() for path in files]
    found = file_digests(folder, names)
    write_json(
        folder / FILES,
        {name: {"bytes": path.stat().st_size, "digest": found[name]} for name, path in zip(names, files)},
    )


def last_whole_checkpoint(folder: Path) -> str | None:
    """Path of the newest checkpoint that is whole; damaged and half-written ones are removed, with a warning."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)
    for checkpoint in found:
        reason = _damage(checkpoint)
        if reason is None:
            return str(checkpoint)
        logger.warning("%s is incomplete (%s) and removed; training goes on from the one before.", checkpoint, reason)
        shutil.rmtree(checkpoint)
    return None


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None: nothing."""
    try:
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        # A process that is killed right after the trainer's last file leaves a whole checkpoint without the list.
        listed = json.loads((checkpoint / FILES).read_text(encoding="utf-8")) if (checkpoint / FILES).exists() else {}
    except (OSError, ValueError):
        return f"{_STATE} or {FILES} cannot be read"
    for name, signature in listed.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != signature["bytes"]:
            return f"{name} has changed"
    digests = {name: signature["digest"] for name, signature in listed.items() if "digest" in signature}
    found = file_digests(checkpoint, digests)
    return next((f"{name} has changed" for name in digests if found[name] != digests[name]), None)
