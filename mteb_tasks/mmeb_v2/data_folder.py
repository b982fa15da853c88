"""Where the data of MMEB-V2 lie: a local folder in a published layout, its archives, or the hub."""

from __future__ import annotations

import io
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import yaml

from mteb_tasks.local_data import stat_signature
from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.mmeb_v2.visdoc_sets import VisDocSet
from unime_st.files import digest, make_once
from unime_st.paths import home

logger = logging.getLogger(__name__)

MMEB_V2_FOLDER_VARIABLE = "MMEB_V2_DIR"
MEDIA_DATASET = "TIGER-Lab/MMEB-V2"
MEDIA_REVISION = "e7bbfeb69a70dfe32ff36da3d6d8dbe31fc36af1"
TABLES = ("queries", "corpus", "qrels")
_PAGE_ARCHIVES = ("visdoc-tasks.data.tar.gz", "visdoc-tasks.images.tar.gz")
_PAGES_IN_PARTS = "visdoc-tasks.tar.gz"
"""The archive of images once more, which the hub also has in parts ``-00``, ``-01``, ``-02``."""
_IMAGE_ARCHIVE = "mmeb_v1.tar.gz"


def local_root() -> Path | None:
    """Folder named by ``$MMEB_V2_DIR``; None when the variable is not set: the data then come from the hub."""
    named = os.environ.get(MMEB_V2_FOLDER_VARIABLE)
    return Path(named).expanduser() if named else None


class DataFolder:
    """Finds tables and pages in a folder with the data of MMEB-V2.

    Layouts that are found: the hub datasets under their ids (also below ``annotations/``), the folders that the
    archives of ``TIGER-Lab/MMEB-V2`` and ``VLM2Vec/MMEB-V3`` unpack to, and those archives themselves, which are
    unpacked once where nothing else is there.

    Args:
        root: The folder.
        unpack: Whether archives may be unpacked.

    Raises:
        MMEBDataError: If `root` is not a folder.
    """

    def __init__(self, root: Path, *, unpack: bool = True) -> None:
        if not root.is_dir():
            raise MMEBDataError(f"{MMEB_V2_FOLDER_VARIABLE}={root} is not a folder")
        self.root, self.unpack = root, unpack

    def tables(self, row: VisDocSet) -> dict[str, list[Path]]:
        """Find the tables of a visual-document set.

        Args:
            row: The set.

        Returns:
            Parquet files by table, see `TABLES`; empty when the set is missing.
        """
        names = [f"annotations/{row.hub}", row.hub, row.source["path"], f"data/{row.hub.rpartition('/')[2]}"]
        names += [f"data/{row.superseded}"] if row.superseded else []
        for folder in self._candidates(names):
            if found := dataset_tables(folder, row.split):
                return found
        return {}

    def page_folder(self, row: VisDocSet) -> Path | None:
        """Find the folder of page images that the official code wrote; None when there is none.

        Args:
            row: The set.
        """
        names = [row.key, f"images/{row.key}"]
        if not row.superseded:  # the plain folder may hold the pages of the faulty version, under the same ids
            names += [row.folder, f"images/{row.folder}"]
        return next((found for found in self._candidates(names) if _holds_images(found)), None)

    def superseded_page_folder(self, row: VisDocSet) -> Path | None:
        """Find pages of a set with a faulty older version under the name that both versions share."""
        names = [row.folder, f"images/{row.folder}"]
        return next((found for found in self._candidates(names) if _holds_images(found)), None)

    def archives(self) -> list[Path]:
        """List the archives and archive parts of visual documents that are there."""
        return [part for name in self._page_archives() for part in self._parts(name)]

    def unpacked_images(self) -> Path | None:
        """Folder that the archive of the image tasks unpacks to; None when there is no archive."""
        parts = self._parts(_IMAGE_ARCHIVE)
        if not parts or not self.unpack:
            return None
        folder = unpacked(parts)
        return folder / "MMEB" if (folder / "MMEB").is_dir() else folder

    def image_archives(self) -> list[Path]:
        """List the parts of the archive of the image tasks."""
        return self._parts(_IMAGE_ARCHIVE)

    def _candidates(self, names: Sequence[str]) -> Iterator[Path]:
        for base in chain([self.root, self.root / "visdoc-tasks"], self._archive_bases()):
            yield from (base / name for name in names)

    def _archive_bases(self) -> Iterator[Path]:
        for name in self._page_archives() if self.unpack else ():
            if parts := self._parts(name):
                folder = unpacked(parts)
                yield from (folder, folder / "visdoc-tasks")

    def _page_archives(self) -> Sequence[str]:
        return _PAGE_ARCHIVES if self._parts(_PAGE_ARCHIVES[1]) else (_PAGE_ARCHIVES[0], _PAGES_IN_PARTS)

    def _parts(self, name: str) -> list[Path]:
        for folder in ("visdoc-tasks", "image-tasks", "visdoc_tasks", "image_tasks", ""):
            if parts := archive_parts(self.root / folder / name):
                return parts
        return []


class HubFolder(DataFolder):
    """Finds the tables of one dataset in the hub's cache, which it fills; pages are in the tables.

    Args:
        row: The set.

    Raises:
        MMEBDataError: If the hub cannot be reached and has not been before.
    """

    def __init__(self, row: VisDocSet) -> None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        path, revision = row.source["path"], row.source["revision"]
        try:
            snapshot = snapshot_download(
                path, repo_type="dataset", revision=revision, allow_patterns=["*.parquet", "README.md"]
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise MMEBDataError(
                f"{path} cannot be fetched ({error}); download it elsewhere and set {MMEB_V2_FOLDER_VARIABLE}"
            ) from error
        super().__init__(Path(snapshot), unpack=False)

    def tables(self, row: VisDocSet) -> dict[str, list[Path]]:
        """Find the tables of the set, see `DataFolder.tables`."""
        return dataset_tables(self.root, row.split)

    def page_folder(self, row: VisDocSet) -> Path | None:
        """Return None: the pages of the hub are in the tables."""
        return None


def dataset_tables(folder: Path, split: str) -> dict[str, list[Path]]:
    """Find the tables of a BEIR dataset in a folder: by the ``configs`` of its README, else by usual names.

    Args:
        folder: Folder of the dataset.
        split: Name of the split.

    Returns:
        Parquet files by table; empty when one of the tables is missing.
    """
    if not folder.is_dir():
        return {}
    configured = _configured(folder, split)
    found: dict[str, list[Path]] = {}
    for name in TABLES:
        usual = [f"{name}/{split}*.parquet", f"data/{name}/{split}*.parquet", f"{name}/*.parquet"]
        usual += [f"data/{name}*.parquet", f"{name}*.parquet"]
        for pattern in [*configured.get(name, ()), *usual]:
            if files := sorted(file for file in folder.glob(pattern) if file.is_file()):
                found[name] = files
                break
    return found if len(found) == len(TABLES) else {}


def _configured(folder: Path, split: str) -> dict[str, list[str]]:
    """Patterns of data files by config, from the header of a dataset card; mteb calls the judgements ``default``."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        configs = (yaml.safe_load(header.group(1)) or {}).get("configs") if header else None
        patterns: dict[str, list[str]] = {}
        for config in configs or ():
            name = {"default": "qrels", "query": "queries"}.get(config["config_name"], config["config_name"])
            files = config["data_files"]
            listed = [{"path": files}] if isinstance(files, str) else files
            chosen = [entry for entry in listed if entry.get("split", split) == split] or listed
            paths = [entry["path"] for entry in chosen]
            patterns[name] = [path for found in paths for path in ([found] if isinstance(found, str) else found)]
        return patterns
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}  # not a card of that form: usual names are tried


def _holds_images(folder: Path) -> bool:
    return folder.is_dir() and any(entry.suffix.lower() in (".png", ".jpg", ".jpeg") for entry in folder.iterdir())


def archive_parts(archive: Path) -> list[Path]:
    """List an archive, or the numbered parts ``<name>-00``, ``<name>-01``, ... it was split into.

    Args:
        archive: Path of the whole archive.

    Returns:
        The files in order; empty when there is neither.

    Raises:
        MMEBDataError: If the numbers have a gap.
    """
    if archive.is_file():
        return [archive]
    if not archive.parent.is_dir():
        return []
    numbered = {int(file.name.rpartition("-")[2]): file for file in archive.parent.glob(f"{archive.name}-[0-9][0-9]")}
    missing = [number for number in range(max(numbered, default=-1)) if number not in numbered]
    if missing:
        raise MMEBDataError(f"{archive}-{missing[0]:02d} is missing: download this part of the archive")
    return [numbered[number] for number in sorted(numbered)]


def unpacked(parts: Sequence[Path]) -> Path:
    """Unpack an archive once, beside it or in the cache of this package, and return the folder."""
    states = [(str(part.resolve()), stat_signature(part.stat())) for part in parts]
    name, beside = f"unpacked-{digest(repr(states), length=16)}", parts[0].parent
    for parent in (beside, home() / "mmeb_v2"):
        if (parent / name).is_dir():
            return parent / name
    parent = beside if os.access(beside, os.W_OK) else home() / "mmeb_v2"

    def unpack(folder: Path) -> None:
        logger.warning("unpacking %s into %s (once)", parts[0], parent)
        try:
            with tarfile.open(fileobj=io.BufferedReader(_Joined(parts)), mode="r|*") as opened:
                opened.extractall(folder, filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            in_parts = parts[0].suffix != ".gz"
            hint = f"is a part after {parts[-1].name} missing?" if in_parts else "download it again"
            raise MMEBDataError(f"{parts[0]} cannot be unpacked ({error}): {hint}") from error

    return make_once(parent / name, unpack)


class _Joined(io.RawIOBase):
    """Files read one after the other, as if they were one."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._waiting = list(files)
        self._open: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            if self._open is None:
                if not self._waiting:
                    return 0
                self._open = self._waiting.pop(0).open("rb")
            data = self._open.read(len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)
            self._open.close()
            self._open = None
