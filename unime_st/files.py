"""Atomic writes, content digests, folder locks and one-time unpacking: what every room does to the file system."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import shutil
import socket
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from unime_st.paths import home

Json = dict[str, Any]
"""A JSON object."""

P = ParamSpec("P")
T = TypeVar("T")
_KEPT_BYTES = 1 << 20
"""Digests of larger files are kept from process to process."""
_CLOCK_NS = 2_000_000_000
"""Coarsest clock of a file system: a younger file may change again and keep its times."""


class FolderInUseError(OSError):
    """Another process works in the folder; the message names it."""


def temporary_path(path: Path) -> Path:
    """Name to write a file under before it is complete: beside ``path``, with the process id, ending in ``.tmp``."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def commit_file(temporary: Path, final: Path, *, sync: bool = True) -> None:
    """Rename a finished, closed temporary file to its final name in the same folder; an existing file is replaced.

    With ``sync`` the bytes are forced to disk first, so that a power failure cannot leave a file that is complete by
    name only. Caches that are cheap to make again do without.
    """
    if sync:
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
    os.replace(temporary, final)


@contextmanager
def atomic_write(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """Write a file that readers see complete or not at all, whatever happens to the process.

    The block writes the temporary file that it is given. The file gets its name when the block ends without an error,
    else it is removed. ``sync`` is that of :func:`commit_file`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(Path(folder, "a.txt")) as temporary:
        ...         _ = temporary.write_text("x")
        ...     os.listdir(folder)
        ['a.txt']
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        yield temporary
        commit_file(temporary, path, sync=sync)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Make a folder that readers see complete or not at all, as :func:`atomic_write` makes a file.

    Raises:
        FileExistsError: ``target`` exists and ``overwrite`` is False.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     with atomic_folder(Path(root, "a")) as part:
        ...         _ = (part / "file").write_text("x")
        ...     os.listdir(root)
        ['a']
    """
    target = Path(target)
    part, old = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("part", "old"))
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if overwrite and target.exists():
            os.replace(target, old)
        if target.exists():  # made by another process in the meantime; renaming would replace an empty folder
            raise FileExistsError(f"{target} exists: another process made it in the meantime")
        os.replace(part, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def folder_lock(folder: str | Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a folder that several processes may write to; the system gives the lock back if its holder dies.

    The lock's file lies beside the folder, ``.<folder>.lock``, as long as it is held.

    Raises:
        FolderInUseError: Another process holds the folder and ``wait`` is False.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root, folder_lock(Path(root, "a")):
        ...     os.listdir(root)
        ['.a.lock']
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_name(f".{folder.name}.lock")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise FolderInUseError(
            f"{folder} is in use by {_holder(file)}. Wait until it has ended, or choose another output folder."
        ) from None
    try:
        with suppress(OSError):  # Windows lets nobody write to a locked file
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        lock.release()


def locks_folder(name: str, *, wait: bool = False) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function that writes to a folder: it holds :func:`folder_lock` while it runs.

    Args:
        name: Parameter of the function that is the folder.
        wait: As for :func:`folder_lock`. Defaults to False.

    Example:
        >>> import tempfile
        >>> @locks_folder("output")
        ... def names(output: str) -> list[str]:
        ...     return os.listdir(Path(output).parent)
        >>> with tempfile.TemporaryDirectory() as root:
        ...     names(os.path.join(root, "a"))
        ['.a.lock']
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def locked(*args: P.args, **kwargs: P.kwargs) -> T:
            with folder_lock(signature.bind(*args, **kwargs).arguments[name], wait=wait):
                return function(*args, **kwargs)

        return locked

    return decorate


def _holder(file: Path) -> str:
    with suppress(OSError, ValueError):
        if name := file.read_text(encoding="utf-8").strip():
            return name
    return "another process"


def write_json(path: str | Path, content: Mapping[str, object] | Sequence[object]) -> None:
    """Write a JSON file atomically, with a final newline; missing folders are made, NaN and infinity refused.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder, "a.json"), {"a": 1})
        ...     read_json(Path(folder, "a.json"))
        {'a': 1}
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path, *, remedy: str = "remove the folder and run the stage again") -> Json:
    """Read a JSON object; a ValueError names a file that cannot be read or holds something else, and the remedy."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}; {remedy}")
    return content


def digest(*parts: str | bytes, length: int = 32) -> str:
    """SHA-256 of some text (as UTF-8) and bytes, one after the other, as up to 64 hexadecimal digits.

    Example:
        >>> digest("abc", b"d", length=8) == digest("abcd", length=8)
        True
    """
    state = hashlib.sha256()
    for part in parts:
        state.update(part.encode() if isinstance(part, str) else part)
    return state.hexdigest()[:length]


def content_digest(path: str | Path, *, length: int = 32) -> str:
    """SHA-256 of what a file holds, or of the relative names and contents of all files in a folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a").write_text("abc")
        ...     content_digest(Path(folder, "a")) == digest("abc")
        True
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(entry for entry in path.rglob("*") if entry.is_file())
        return digest(*(f"{file.relative_to(path)} {content_digest(file)}\n" for file in files), length=length)
    with path.open("rb", buffering=0) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:length]


def file_digests(folder: str | Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files in a folder; those of large files are computed once on a machine.

    A digest is kept in ``$UNIME_HOME/digests`` and holds as long as size, times and inode of the file stay.

    Args:
        folder: The folder.
        names: Names of the files, relative to the folder.

    Returns:
        dict: 32 hexadecimal digits by name.

    Raises:
        FileNotFoundError: A file is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a").write_text("abc")
        ...     file_digests(folder, ["a"]) == {"a": digest("abc")}
        True
    """
    folder = Path(folder).resolve()
    record = home() / "digests" / f"{digest(str(folder))}.json"
    kept: Json = {}
    with suppress(ValueError):
        kept = read_json(record)
    found, fresh = {}, {}
    for name in names:
        start, path = time.time_ns(), folder / name
        stat = path.stat()
        signature = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = kept.get(name)
        if isinstance(known, list) and known[:-1] == signature:
            found[name] = str(known[-1])
            continue
        found[name] = content_digest(path)
        if stat.st_size >= _KEPT_BYTES and max(stat.st_mtime_ns, stat.st_ctime_ns) < start - _CLOCK_NS:
            fresh[name] = [*signature, found[name]]
    if fresh:
        with suppress(OSError):  # without a writable home they are computed again
            write_json(record, {**kept, **fresh})
    return found


def make_once(target: str | Path, fill: Callable[[Path], None]) -> Path:
    """Return a folder of a cache; the first of several processes that ask for it makes it with ``fill``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     folder = make_once(Path(root, "a"), lambda folder: (folder / "file").touch())
        ...     os.listdir(folder)
        ['file']
    """
    target = Path(target)
    if not target.is_dir():
        with folder_lock(target):
            if not target.is_dir():
                with atomic_folder(target) as part:
                    fill(part)
    return target


def unpack_zip(archive: Path, folder: Path) -> None:
    """Unpack a zip archive; members that would leave the folder are written inside it.

    Raises:
        ValueError: The archive is damaged, encrypted or compressed by an unknown method.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # the last: encrypted, unknown method
        raise ValueError(f"{archive} cannot be unpacked ({error}): download it again") from error
