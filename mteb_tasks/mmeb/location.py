"""Where MMEB's evaluation data lie: a local folder, or the hub."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "MMEB_EVAL_DIR"
HUB_DATASET = "TIGER-Lab/MMEB-eval"
HUB_REVISION = "main"
"""No commit of the data is known to us; the one that was found is written into each result."""
_IMAGE_FOLDERS = ("images", "eval_images", "image-tasks", "")


class MMEBDataError(ValueError):
    """Evaluation data that are missing or not what the benchmark prescribes; names the file and the row."""


def local_root() -> Path | None:
    """Folder named by ``$MMEB_EVAL_DIR``.

    Returns:
        The folder, which may not exist (tasks are made long before data are needed), or None when the variable is not
        set: the data then come from the hub.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named).expanduser() if named else None


def data_root(subsets: Iterable[str]) -> Path:
    """Folder with the evaluation data, fetched from the hub when no local folder is named.

    Args:
        subsets: Names of the subsets that are needed (only these are fetched).

    Returns:
        The folder.

    Raises:
        MMEBDataError: If the named folder does not exist, or the hub cannot be reached and has not been before.
    """
    root = local_root()
    if root is not None:
        if not root.is_dir():
            raise MMEBDataError(f"{FOLDER_VARIABLE}={root} is not a folder")
        return root
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [f"{name}/*" for name in subsets] + ["images.zip"]
    try:
        folder = snapshot_download(HUB_DATASET, repo_type="dataset", revision=HUB_REVISION, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MMEBDataError(
            f"{HUB_DATASET} cannot be fetched ({error}); download it elsewhere and set {FOLDER_VARIABLE} to its folder"
        ) from error
    return Path(folder)


def parquet_files(root: Path, subset: str) -> list[Path]:
    """Find the table of a subset.

    Args:
        root: Folder of the evaluation data.
        subset: Official name.

    Returns:
        Its shards, sorted; empty when the subset is missing. The subset folder may lie in `root`, in ``MMEB-eval/``
        or in ``data/`` below it.
    """
    for parent in (root, root / "MMEB-eval", root / "data"):
        found = sorted(file for file in (parent / subset).glob("test*.parquet") if file.is_file())
        if found:
            return found
    return []


class ImageFolders:
    """Finds the image files that rows name.

    Pictures may lie in ``images/``, ``eval_images/``, ``image-tasks/`` or directly in the data folder or beside it. A
    ``images.zip`` is unpacked once: reading through the archive is many times slower.

    Args:
        root: Folder of the evaluation data.
    """

    def __init__(self, root: Path) -> None:
        places = [root, root.parent] if root.name == "MMEB-eval" else [root]
        unpacked = _unpacked(root / "images.zip")
        self._bases = [place / name for place in places for name in _IMAGE_FOLDERS]
        self._bases += [unpacked / name for name in _IMAGE_FOLDERS] if unpacked else []
        self._listed: dict[str, list[tuple[Path, set[str]]]] = {}

    def find(self, relative: str) -> Path | None:
        """Locate one picture.

        Args:
            relative: Path as it stands in the table, for instance ``"OK-VQA/1.jpg"``.

        Returns:
            The file, or None when there is none.
        """
        folder, _, name = relative.rpartition("/")
        if folder not in self._listed:
            self._listed[folder] = self._listings(folder)
        return next((place / name for place, names in self._listed[folder] if name in names), None)

    def _listings(self, folder: str) -> list[tuple[Path, set[str]]]:
        """Where a folder is, and the names in it: one listing of each instead of a look-up for every picture."""
        part = Path(folder)
        if part.is_absolute() or ".." in part.parts:
            return []
        places = [base / part for base in self._bases]
        return [(place, set(os.listdir(place))) for place in places if place.is_dir()]


def _unpacked(archive: Path) -> Path | None:
    """Unpack an archive once, next to it or in the cache of this project, and return the folder."""
    if not archive.is_file():
        return None
    from unime_st.registry import home

    state = archive.stat()
    name = hashlib.sha256(f"{archive.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:16]
    for parent in (archive.parent, home() / "mmeb"):
        done = parent / f"unpacked-{name}"
        if done.is_dir():
            return done
    parent = archive.parent if os.access(archive.parent, os.W_OK) else home() / "mmeb"
    parent.mkdir(parents=True, exist_ok=True)
    logger.warning("unpacking %s into %s (once)", archive, parent)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".unpacking-") as scratch:
        content = Path(scratch) / "content"
        try:
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(content)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise MMEBDataError(f"{archive} is not a whole zip archive ({error}): download it again") from error
        content.rename(parent / f"unpacked-{name}")  # complete or not there at all
    return parent / f"unpacked-{name}"


def fingerprint(root: Path, subset: str) -> str:
    """Short digest of a subset's data, to tell a changed local data set from the one that was scored.

    Args:
        root: Folder of the evaluation data.
        subset: Official name.

    Returns:
        12 hexadecimal digits over the bytes of the table and of the files in the picture folders that carry its name,
        and over the checksums in ``images.zip``; ``"missing"`` when there is no table.
    """
    files = parquet_files(root, subset)
    if not files:
        return "missing"
    digest = hashlib.sha256()
    for file in files:
        digest.update(_digest(file, file.stat().st_size, file.stat().st_mtime_ns))
    places = [root, root.parent] if root.name == "MMEB-eval" else [root]
    for folder in (place / name / subset for place in places for name in _IMAGE_FOLDERS):
        digest.update(_picture_digest(folder))
    archive = root / "images.zip"
    if archive.is_file():
        members = _checksums(archive, archive.stat().st_size, archive.stat().st_mtime_ns)
        digest.update(repr(members.get(subset)).encode())
    return digest.hexdigest()[:12]


def _picture_digest(folder: Path) -> bytes:
    """Hash of the files of a folder other than tables; kept on disk, because each process asks for it."""
    from unime_st.registry import home

    files = sorted(os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)
    states = [(file, state) for file in files if not file.endswith(".parquet") and (state := _state(file))]
    if not states:
        return b""
    known = repr([(name, state.st_size, state.st_mtime_ns) for name, state in states])
    kept = home() / "mmeb" / "digests" / hashlib.sha256(known.encode()).hexdigest()
    if kept.is_file():
        return kept.read_bytes()
    digest = hashlib.sha256()
    for name, _ in states:
        digest.update(os.path.relpath(name, folder).encode() + _hash(name))
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as opened:
        opened.write(digest.digest())
    os.replace(opened.name, kept)
    return digest.digest()


def _state(file: str) -> os.stat_result | None:
    """State of a regular file; a link that leads nowhere is none, and whoever looks for it is told that it is missing."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


@lru_cache(maxsize=4)
def _checksums(archive: Path, size: int, modified: int) -> dict[str, list[tuple[str, int]]]:
    """Names and checksums of an archive's files by the folder they are in; nothing is unpacked."""
    found: dict[str, list[tuple[str, int]]] = {}
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                for folder in Path(member.filename).parts[:-1]:
                    found.setdefault(folder, []).append((member.filename, member.CRC))
    except zipfile.BadZipFile:
        pass  # said aloud when it is unpacked
    return found


@lru_cache(maxsize=256)
def _digest(file: Path, size: int, modified: int) -> bytes:
    """Hash of a file; size and time of change are part of the key so that a changed file is read again."""
    return _hash(file)


def _hash(file: str | Path) -> bytes:
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as opened:  # hashlib.file_digest needs Python 3.11
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.digest()
