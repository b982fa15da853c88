"""Local evaluation data: dataset folders, digests, file checks, and task metadata that carry a digest."""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from unime_st.data.images import MAX_BYTES, MAX_PIXELS, ImageRef
from unime_st.files import digest

EVAL_FOLDER_VARIABLE = "UNIME_EVAL_DIR"
LOCAL_PREFIX = "local-"
"""What the revision of data in a folder of the user's begins with."""
StatSignature = tuple[int, int, int]
"""From `stat_signature`."""


def evaluation_folder(*names: str) -> Path:
    """Find a dataset below ``$UNIME_EVAL_DIR``.

    Args:
        *names: Possible names of the dataset's folder.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If the variable is not set or there is no such folder.
    """
    named = os.environ.get(EVAL_FOLDER_VARIABLE)
    if not named:
        raise FileNotFoundError(
            f"set {EVAL_FOLDER_VARIABLE} to the folder that holds {names[0]}/ (see docs/evaluation.md)"
        )
    for parent in (Path(named).expanduser(), Path(named).expanduser() / "retrieval"):
        for name in names:
            if (parent / name).is_dir():
                return parent / name
    raise FileNotFoundError(f"{EVAL_FOLDER_VARIABLE}={named} has no folder {' or '.join(names)}")


def folder_digest(*folders: Path) -> str:
    """Digest of the names, sizes and times of change of all files in some folders.

    Args:
        *folders: Folders, links to folders below them included; one that does not exist is an empty one.

    Returns:
        12 hexadecimal digits.
    """
    parts = []
    for folder in folders:
        seen = {os.path.realpath(folder)}
        for parent, inner, names in os.walk(folder, followlinks=True):
            # A link may lead back to a folder above it.
            behind = {name: os.path.realpath(os.path.join(parent, name)) for name in inner}
            inner[:] = sorted(name for name in inner if behind[name] not in seen)
            seen.update(behind.values())
            for name in sorted(names):
                file = Path(parent, name)
                if file.is_file():
                    parts.append(f"{file.relative_to(folder)} {stat_signature(file.stat())}\n")
    return digest(*parts, length=12)


def stat_signature(found: os.stat_result) -> StatSignature:
    """Signature of a file that changes when the file does, without reading it.

    Args:
        found: From ``os.stat``.

    Returns:
        Size, time of modification and time of change; tools that copy set the former time, nobody can set the latter.
    """
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def with_digest(metadata: Any, revision: str) -> Any:
    """Metadata of a task for data in a folder.

    Args:
        metadata: Metadata of the class.
        revision: Digest of the data.

    Returns:
        A copy whose revision and subset names carry the digest: mteb evaluates again when a subset has no result yet,
        so it never takes a score of other data for this one's.
    """
    subsets = metadata.eval_langs if isinstance(metadata.eval_langs, dict) else {"": metadata.eval_langs}
    tag = f"{LOCAL_PREFIX}{revision}"
    names = {f"{subset}-{tag}" if subset else tag: languages for subset, languages in subsets.items()}
    return metadata.model_copy(update={"dataset": {**metadata.dataset, "revision": tag}, "eval_langs": names})


def without_digest(subset: str) -> str:
    """Name of a subset without the digest of local data.

    Example:
        >>> without_digest("swap_obj-local-4fc98cea1690"), without_digest("default")
        ('swap_obj', 'default')
    """
    return subset.rpartition(f"-{LOCAL_PREFIX}")[0] or subset


def resolve_within(folder: Path, name: str) -> Path | None:
    """A file that data name, if it lies below their folder; links there may lead where the user put the file.

    Args:
        folder: Root of the data.
        name: Relative path as it stands in the data.

    Returns:
        The file; None if there is none or the path would leave the folder.
    """
    part = Path(name)
    if part.is_absolute() or ".." in part.parts or not (folder / part).is_file():
        return None
    return folder / part


def image_fault(source: str | Path | bytes) -> str | None:
    """Fault of an encoded image, as far as its header, its end and, of PNG, its checksums show.

    Args:
        source: Path, or the content of a file.

    Returns:
        The end of a sentence that begins with the name of the image; None if nothing seems wrong.
    """
    if _seems_whole(source):
        return None
    if not isinstance(source, bytes) and not os.path.lexists(source):
        return "is missing"
    reference = ImageRef(data=source) if isinstance(source, bytes) else ImageRef(path=str(source))
    try:
        reference.open()  # unusual, but perhaps whole: decoding decides
        with _opened(source) as file, Image.open(file) as image:
            image.verify()
    except Exception as error:  # decoders raise nearly any type on hostile bytes
        return f"is broken: {error}"
    return None


def _opened(source: str | Path | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


def _seems_whole(source: str | Path | bytes) -> bool:
    """Whether a file is an image up to its end mark (a cheap test for downloads cut off in the middle)."""
    try:
        if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
            return False  # opening a pipe would block
        with _opened(source) as file:
            if not 12 <= file.seek(0, os.SEEK_END) <= MAX_BYTES:
                return False
            file.seek(-12, os.SEEK_END)
            tail = file.read()
            file.seek(0)
            image = Image.open(file)
            image.verify()
    except Exception:  # decoders raise nearly any type on hostile bytes; a closer look names the fault
        return False
    return image.width * image.height <= MAX_PIXELS and (tail.endswith(b"\xff\xd9") or b"IEND" in tail)


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Args:
        file: The file.

    Returns:
        Its content.

    Raises:
        ValueError: If it is damaged; names it.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}): download it again") from error
