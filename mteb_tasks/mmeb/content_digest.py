"""Digest of a subset's local data: changed data are scored again."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from mteb_tasks.local_data import StatSignature, stat_signature
from mteb_tasks.mmeb.location import IMAGE_FOLDERS, ImageFolders, MMEBDataError, parquet_files
from mteb_tasks.mmeb.subset_reader import read_table
from unime_st.files import atomic_write, content_digest, digest


def subset_digest(root: Path, subset: str) -> str:
    """Short digest of a subset's data; nothing is unpacked.

    Args:
        root: Folder of the evaluation data.
        subset: Official name.

    Returns:
        12 hexadecimal digits over the bytes of the table and of the images that it names, or their checksums in
        ``images.zip``; ``"missing"`` when there is no table.
    """
    files = parquet_files(root, subset)
    if not files:
        return "missing"
    parts: list[bytes] = []
    named: set[str] = set()
    for table in files:
        parts.append(_digest(table, stat_signature(table.stat())))
        named |= _images(table, stat_signature(table.stat()))
    folders = ImageFolders(root, archive=False)
    located = {name: file for name in sorted(named) if (file := folders.find(name))}
    parts.append(files_digest(located))
    archive, packed = root / "images.zip", sorted(named - located.keys())
    if packed and archive.is_file():
        sums = _checksums(archive, stat_signature(archive.stat()))
        listed = [[sums.get(f"{folder}/{name}".lstrip("/")) for folder in IMAGE_FOLDERS] for name in packed]
        parts.append(repr(listed).encode())
    return digest(*parts, length=12)


@lru_cache(maxsize=64)
def _images(file: Path, signature: StatSignature) -> frozenset[str]:
    """Paths of images in a table; its version is part of the key so that a changed one is read again."""
    names: set[object] = set()
    try:
        table = read_table(file)
        for column in ("qry_img_path", "tgt_img_path"):
            for chunk in table[column].chunks:
                is_list = pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type)
                names.update(pc.unique(chunk.flatten() if is_list else chunk).to_pylist())
    except (MMEBDataError, pa.ArrowException):
        return frozenset()  # the error comes when its rows are needed
    return frozenset(name for name in names if isinstance(name, str) and name)


def files_digest(files: Mapping[str, str | Path]) -> bytes:
    """Digest of names and contents of files; kept on disk, because each process asks for it.

    Args:
        files: File by the name that counts. A link that leads nowhere is left out.

    Returns:
        32 bytes, none where there is no file. Files are read again only when their size or times have changed.
    """
    from unime_st.paths import home

    states = {name: state for name, file in files.items() if (state := _state(file))}
    if not states:
        return b""
    known = repr([(name, str(files[name]), stat_signature(state)) for name, state in states.items()])
    kept = home() / "mmeb" / "digests" / digest(known, length=64)
    if kept.is_file():
        return kept.read_bytes()
    parts = (part for name in states for part in (name, _hash(Path(files[name]))))
    found = bytes.fromhex(digest(*parts, length=64))
    kept.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(kept, sync=False) as temporary:
        temporary.write_bytes(found)
    return found


def _state(file: str | Path) -> os.stat_result | None:
    """State of a regular file; None for a broken link, which is reported as missing when it is needed."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


@lru_cache(maxsize=4)
def _checksums(archive: Path, signature: StatSignature) -> dict[str, int]:
    """Checksums of an archive's files."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return {member.filename: member.CRC for member in opened.infolist()}
    except zipfile.BadZipFile:
        return {}  # the error comes when it is unpacked


@lru_cache(maxsize=256)
def _digest(file: Path, signature: StatSignature) -> bytes:
    return _hash(file)


def _hash(file: Path) -> bytes:
    return bytes.fromhex(content_digest(file, length=64))
