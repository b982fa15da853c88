"""Where MMEB's evaluation data lie: a local folder, or the hub."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mteb_tasks.local_data import stat_signature
from unime_st.files import digest, make_once, unpack_zip

logger = logging.getLogger(__name__)

MMEB_FOLDER_VARIABLE = "MMEB_EVAL_DIR"
HUB_DATASET = "TIGER-Lab/MMEB-eval"
HUB_REVISION = "2f069730be515ea60778413777816b53e2d2a697"
"""Commit of the data; the one that was found in the hub's cache is written into each result."""
IMAGE_FOLDERS = ("images", "eval_images", "image-tasks", "")
TABLE_FOLDERS = (
    "",
    "MMEB-eval",
    "data",
    "annotations/ziyjiang/MMEB_Test_Instruct",
    "ziyjiang/MMEB_Test_Instruct",
    "image-query",
    "image-tasks",
)
"""Where tables lie: those of ``TIGER-Lab/MMEB-eval``, or the same rows as MMEB-V2 and MMEB-V3 store them."""


class MMEBDataError(ValueError):
    """Evaluation data that are missing or not what the benchmark prescribes; names the file and the row."""


def local_root() -> Path | None:
    """Folder named by ``$MMEB_EVAL_DIR``.

    Returns:
        The folder, which may not exist (tasks are made long before data are needed), or None when the variable is not
        set: the data then come from the hub.
    """
    named = os.environ.get(MMEB_FOLDER_VARIABLE)
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
            raise MMEBDataError(f"{MMEB_FOLDER_VARIABLE}={root} is not a folder")
        return root
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [f"{name}/*" for name in subsets] + ["images.zip"]
    try:
        folder = snapshot_download(HUB_DATASET, repo_type="dataset", revision=HUB_REVISION, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MMEBDataError(
            f"{HUB_DATASET} cannot be fetched ({error}); download it elsewhere and set {MMEB_FOLDER_VARIABLE} to its folder"
        ) from error
    return Path(folder)


def parquet_files(root: Path, subset: str) -> list[Path]:
    """Find the table of a subset.

    Args:
        root: Folder of the evaluation data.
        subset: Official name.

    Returns:
        Its shards, sorted; empty when the subset is missing. The subset folder may lie in `root` or in one of
        `TABLE_FOLDERS` below it.
    """
    for parent in TABLE_FOLDERS:
        found = sorted(file for file in (root / parent / subset).glob("test*.parquet") if file.is_file())
        if found:
            return found
    return []


def check_shards(files: Sequence[Path]) -> None:
    """Check that no shard of a table is missing, as far as names like ``test-00000-of-00002.parquet`` tell.

    Args:
        files: Shards of one table.

    Raises:
        MMEBDataError: Names the first missing shard.
    """
    present = {file.name for file in files}
    for file in files:
        if found := re.fullmatch(r"(.*-)\d{5}-of-(\d{5})\.parquet", file.name):
            for number in range(int(found[2])):
                name = f"{found[1]}{number:05d}-of-{found[2]}.parquet"
                if name not in present:
                    raise MMEBDataError(f"{file.with_name(name)} is missing: download this part of the table")


class ImageFolders:
    """Finds the image files that rows name.

    Images may lie in ``images/``, ``eval_images/``, ``image-tasks/`` or directly in the data folder or beside it. A
    ``images.zip`` is unpacked once: reading through the archive is many times slower.

    Args:
        root: Folder of the evaluation data.
        archive: Whether to unpack ``images.zip`` and to look there, too.
        extra: Further folders to look into.
    """

    def __init__(self, root: Path, *, archive: bool = True, extra: Sequence[Path] = ()) -> None:
        indices = [root, root.parent] if root.name == "MMEB-eval" else [root]
        unpacked = _unpacked(root / "images.zip") if archive else None
        self._bases = [index / name for index in indices for name in IMAGE_FOLDERS]
        self._bases += [unpacked / name for name in IMAGE_FOLDERS] if unpacked else []
        self._bases += extra
        self._listed: dict[str, list[tuple[str, set[str]]]] = {}

    def find(self, relative: str) -> str | None:
        """Locate one image.

        Args:
            relative: Path as it stands in the table, for instance ``"OK-VQA/1.jpg"``.

        Returns:
            The file, or None when there is none. No `Path`: a benchmark asks for a hundred thousand files.
        """
        folder, _, name = relative.rpartition("/")
        if folder not in self._listed:
            self._listed[folder] = self._listings(folder)
        for index, names in self._listed[folder]:
            if name in names:
                return f"{index}{os.sep}{name}"
        return None

    def _listings(self, folder: str) -> list[tuple[str, set[str]]]:
        """Where a folder is, and the names in it: one listing of each instead of a look-up for every image."""
        part = Path(folder)
        if part.is_absolute() or ".." in part.parts:
            return []
        indices = [base / part for base in self._bases]
        return [(str(index), set(os.listdir(index))) for index in indices if index.is_dir()]


def _unpacked(archive: Path) -> Path | None:
    """Unpack an archive once, next to it or in the cache of this project, and return the folder."""
    if not archive.is_file():
        return None
    from unime_st.paths import home

    name = "unpacked-" + digest(f"{archive.resolve()} {stat_signature(archive.stat())}", length=16)
    for parent in (archive.parent, home() / "mmeb"):
        if (parent / name).is_dir():
            return parent / name
    parent = archive.parent if os.access(archive.parent, os.W_OK) else home() / "mmeb"

    def unpack(folder: Path) -> None:
        logger.warning("unpacking %s into %s (once)", archive, parent)
        unpack_zip(archive, folder)

    try:
        return make_once(parent / name, unpack)
    except ValueError as error:
        raise MMEBDataError(str(error)) from error
