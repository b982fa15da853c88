"""Stage folders: the plan written first (``stage.json``), the manifest written last (``manifest.json``)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from unime_st.files import Json, atomic_write, content_digest, file_digests, read_json, write_json

logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1
"""Version of the folder layout; a reader refuses folders written by a newer one."""

MANIFEST = "manifest.json"
PLAN = "stage.json"
SHARD_DIGESTS = "shards.sha256"
"""Digests of the shards of a stage that has not finished, one ``digest  name`` a line."""

_DATA = (".parquet", ".npy", ".faiss")
_WHOLE_FILE = 1 << 28
_SAMPLE = 1 << 20


class StageConflictError(ValueError):
    """A stage folder was made from other inputs or options."""


def is_complete(folder: str | Path) -> bool:
    """Whether a stage has finished in ``folder``: its manifest is there, which is written last."""
    return (Path(folder) / MANIFEST).is_file()


def read_manifest(folder: str | Path) -> Json:
    """Read the manifest of a finished stage.

    Args:
        folder: The stage's folder.

    Returns:
        dict: The manifest, with at least "schema_version".

    Raises:
        FileNotFoundError: If the stage has not finished.
        ValueError: If the manifest is damaged or was written by a newer version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        hint = "its stage has not finished: run it again" if (Path(folder) / PLAN).is_file() else "not a stage folder"
        raise FileNotFoundError(f"{folder}: no {MANIFEST} ({hint})")
    manifest = read_json(path)
    version = manifest.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(
            f"{path}: schema_version is {version!r}, this version of unime-st reads up to {SCHEMA_VERSION}"
        )
    return manifest


def open_stage(folder: str | Path) -> Json:
    """Read the manifest of a finished stage and compare its files with their digests.

    Raises:
        FileNotFoundError: If the stage has not finished.
        ValueError: If a file is missing, damaged, replaced or of another origin; the message names it.
    """
    manifest, folder = read_manifest(folder), Path(folder)
    listed = manifest.get("files")
    if not isinstance(listed, dict):  # written by an older version
        return manifest
    remedy = f"remove {folder} and run the stage that writes it again"
    present = _data_files(folder)
    for name in sorted({*listed} ^ {*present}):
        what = "was not written by the stage of this folder" if name in present else "is missing"
        raise ValueError(f"{folder / name} {what}: {remedy}")
    for name, found in file_digests(folder, listed).items():
        if found != listed[name]:
            raise ValueError(f"{folder / name} has changed since its stage wrote it (damaged or replaced): {remedy}")
    return manifest


def _data_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in _DATA and path.is_file())


def record_shard(folder: Path, file: Path, name: str) -> None:
    """Write down the digest of a complete file before it gets its name, so that a resumed stage can check it."""
    with (folder / SHARD_DIGESTS).open("a", encoding="utf-8") as lines:
        lines.write(f"{content_digest(file)}  {name}\n")


def is_whole_shard(path: Path) -> bool:
    """Whether a shard of an unfinished stage is there and as it was written; a damaged one is removed."""
    if not path.is_file():
        return False
    record = path.parent / SHARD_DIGESTS
    lines = record.read_text(encoding="utf-8", errors="replace").splitlines() if record.is_file() else []
    if f"{content_digest(path)}  {path.name}" in lines or is_complete(path.parent):  # another process has finished
        return True
    logger.warning("%s is damaged or of another origin: it is removed, and its rows are computed again.", path)
    path.unlink(missing_ok=True)
    return False


def write_manifest(folder: str | Path, manifest: Mapping[str, object]) -> None:
    """Declare a stage finished: write its manifest in one step.

    Args:
        folder: The stage's folder; everything else in it must already be written.
        manifest: JSON-serializable facts about the stage. "schema_version", and "files", the digests of shards,
            arrays and indices, are added.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = file_digests(folder, _data_files(folder))
    facts = {**manifest, "files": files} if files else manifest
    write_json(folder / MANIFEST, {"schema_version": SCHEMA_VERSION, **facts})
    for name in (PLAN, SHARD_DIGESTS):
        (folder / name).unlink(missing_ok=True)


def fingerprint_inputs(*inputs: str | Path) -> str:
    """Digest of the content that a stage reads, 32 hexadecimal digits.

    A stage folder is identified by its manifest, a file by its bytes, any other folder by the files in it. Files above
    256 MiB are identified by size, modification time, first and last MiB, so that a start does not cost a full read.

    Raises:
        FileNotFoundError: If an input does not exist.
    """
    digest = hashlib.sha256()
    for path in map(Path, inputs):
        if is_complete(path):
            _digest_file(digest, path / MANIFEST)
        elif path.is_dir():
            for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
                digest.update(str(file.relative_to(path)).encode("utf-8", "surrogateescape"))
                _digest_file(digest, file)
        elif path.is_file():
            _digest_file(digest, path)
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    return digest.hexdigest()[:32]


def begin_stage(
    folder: str | Path,
    stage: str,
    *,
    inputs: Iterable[str | Path],
    options: Mapping[str, object],
    overwrite: bool = False,
) -> bool:
    """Open a folder for a stage, or recognize that its work is already done.

    The plan (stage, inputs, options) is written to ``stage.json`` before any work and becomes part of the manifest at
    the end, see :func:`finish_stage`. A stage started again with the same plan continues; with another plan it is
    refused, because the folder would mix two results.

    Args:
        folder: Output folder; created if absent.
        stage: Name of the stage, such as "mine".
        inputs: Files or folders the stage reads.
        options: Every option that changes the result; JSON-serializable.
        overwrite: Delete the folder's content first. Defaults to False.

    Returns:
        bool: True if there is work to do, False if the folder already holds the finished result.

    Raises:
        StageConflictError: If the folder belongs to another stage, other inputs or other options.
        FileExistsError: If the folder holds files that no stage wrote.

    Example:
        >>> import tempfile
        >>> from unime_st.data.manifest import begin_stage, finish_stage
        >>> folder = tempfile.mkdtemp()
        >>> begin_stage(folder, "demo", inputs=[], options={"k": 1})
        True
        >>> finish_stage(folder, {"rows": 0})
        >>> begin_stage(folder, "demo", inputs=[], options={"k": 1})
        False
    """
    folder = Path(folder)
    plan = _plain({"stage": stage, "inputs": fingerprint_inputs(*inputs), "options": dict(options)})
    if overwrite and folder.exists():
        _clear(folder)
    found = _existing_plan(folder)
    if found is not None:
        _require_same(folder, found, plan)
        if is_complete(folder):
            open_stage(folder)
            return False
        return True
    folder.mkdir(parents=True, exist_ok=True)
    if any(not entry.name.endswith(".tmp") for entry in folder.iterdir()):
        raise FileExistsError(f"{folder}: not empty and not a stage folder; choose another output folder")
    write_json(folder / PLAN, plan)
    return True


def finish_stage(folder: str | Path, facts: Mapping[str, object]) -> None:
    """Write the manifest of a stage that :func:`begin_stage` opened: its plan, counts, statistics, names of models."""
    plan = read_json(Path(folder) / PLAN)
    for leftover in Path(folder).glob("*.tmp"):  # of a process that was killed while writing
        leftover.unlink()
    write_manifest(folder, {**plan, **facts})


def link_items(source: Path, target: Path) -> None:
    """Copy the item shards of a finished stage folder to another one, by hard links where possible.

    Committed shards never change, so a hard link is a safe copy that takes no space. On another file system the files
    are copied. Existing item shards are replaced.
    """
    for path in sorted(source.glob("items-*.parquet")):
        with atomic_write(target / path.name, sync=False) as temporary:
            temporary.unlink(missing_ok=True)
            try:
                os.link(path, temporary)
            except OSError:
                shutil.copyfile(path, temporary)


def _plain(content: Json) -> Json:
    # What JSON gives back: tuples become lists, so that plans compare equal after a restart.
    return json.loads(json.dumps(content, default=str))


def _existing_plan(folder: Path) -> Json | None:
    if is_complete(folder):
        return read_manifest(folder)
    return read_json(folder / PLAN) if (folder / PLAN).is_file() else None


def _require_same(folder: Path, found: Json, plan: Json) -> None:
    before, now = found.get("options", {}), plan["options"]
    differences = [
        f"{name}: {before.get(name)!r} there, {now.get(name)!r} now"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if found.get("stage") != plan["stage"]:
        differences.insert(0, f"stage: {found.get('stage')!r} there, {plan['stage']!r} now")
    if found.get("inputs") != plan["inputs"]:
        differences.append("the input data are not the same")
    if differences:
        raise StageConflictError(
            f"{folder} was made from other inputs or options ({'; '.join(differences)}). "
            "Choose another output folder, or pass --overwrite (overwrite=True) to delete the old result."
        )


def _clear(folder: Path) -> None:
    if _existing_plan(folder) is None:
        if any(folder.iterdir()):
            raise FileExistsError(f"{folder}: not a stage folder, so it is not overwritten; remove it yourself")
        return
    # A kill in the middle must leave an unfinished but recognizable stage folder: the plan goes last.
    if (folder / MANIFEST).is_file():
        os.replace(folder / MANIFEST, folder / PLAN)
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == PLAN):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _digest_file(digest: Any, path: Path) -> None:
    stat = path.stat()
    digest.update(stat.st_size.to_bytes(8, "big"))
    with path.open("rb") as handle:
        if stat.st_size <= _WHOLE_FILE:
            while block := handle.read(_SAMPLE):
                digest.update(block)
            return
        digest.update(str(stat.st_mtime_ns).encode("ascii"))
        digest.update(handle.read(_SAMPLE))
        handle.seek(-_SAMPLE, os.SEEK_END)
        digest.update(handle.read(_SAMPLE))
