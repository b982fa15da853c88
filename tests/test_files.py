"""Atomic writes, digests, locks and unpacking of `unime_st.files`."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from unime_st.files import (
    FolderInUseError,
    atomic_folder,
    atomic_write,
    content_digest,
    digest,
    folder_lock,
    make_once,
    read_json,
    unpack_zip,
    write_json,
)

HOLD = """
import sys, time
from unime_st.files import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_atomic_write_replaces_only_on_success(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("half way")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_atomic_folder(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with pytest.raises(RuntimeError), atomic_folder(target) as part:
        (part / "file").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    for content in ("1", "2"):
        with atomic_folder(target, overwrite=True) as part:
            (part / content).write_text(content)
    assert os.listdir(tmp_path) == ["a"] and os.listdir(target) == ["2"]
    with pytest.raises(FileExistsError), atomic_folder(target):
        pass
    assert os.listdir(target) == ["2"]


def test_a_folder_made_in_the_meantime_is_kept(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="another process"), atomic_folder(tmp_path / "a"):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "theirs").touch()
    assert os.listdir(tmp_path / "a") == ["theirs"] and os.listdir(tmp_path) == ["a"]


def test_the_lock_names_its_holder_and_is_given_back_when_the_holder_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(FolderInUseError, match=rf"out is in use by process {holder.pid} on"):
            folder_lock(folder, wait=False).__enter__()
        holder.send_signal(signal.SIGKILL)
    with folder_lock(folder, wait=False):
        pass
    assert os.listdir(tmp_path) == []


def _count(folder: Path, number: int) -> None:
    for _ in range(20):
        with folder_lock(folder):
            count = int((folder / "count").read_text())
            time.sleep(0.001)
            (folder / "count").write_text(str(count + 1))


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "count").write_text("0")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_count, args=(folder, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (folder / "count").read_text() == "60"


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": ["ä", 1.5]})
    assert read_json(path) == {"a": ["ä", 1.5]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": ["ä", 1.5]} and os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_damaged_json_names_the_file_and_the_remedy(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a.json.*download it again"):
        read_json(tmp_path / "a.json", remedy="download it again")


def test_digests(tmp_path: Path) -> None:
    assert digest("ä", b"b") == hashlib.sha256("äb".encode()).hexdigest()[:32]
    assert len(digest(length=64)) == 64
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"x" * 3_000_000)
    assert content_digest(tmp_path / "a" / "b") == digest(b"x" * 3_000_000)
    first = content_digest(tmp_path)
    (tmp_path / "a" / "b").rename(tmp_path / "a" / "c")
    second = content_digest(tmp_path)
    (tmp_path / "a" / "c").write_bytes(b"x" * 2_999_999 + b"y")
    assert len({first, second, content_digest(tmp_path)}) == 3
    with pytest.raises(FileNotFoundError):
        content_digest(tmp_path / "missing")


def test_make_once(tmp_path: Path) -> None:
    calls = []

    def fill(folder: Path) -> None:
        calls.append(folder)
        (folder / "x").touch()

    assert make_once(tmp_path / "deep" / "a", fill) == make_once(tmp_path / "deep" / "a", fill)
    assert len(calls) == 1 and os.listdir(tmp_path / "deep") == ["a"]
    with pytest.raises(ZeroDivisionError):
        make_once(tmp_path / "b", lambda folder: 1 / 0)  # type: ignore[arg-type, return-value]
    assert not (tmp_path / "b").exists()


def test_unpacked_members_stay_inside(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("ok.txt", "../up.txt", "/root.txt", "d/../../e.txt"):
            archive.writestr(name, name)
    unpack_zip(tmp_path / "a.zip", tmp_path / "out")
    found = set(tmp_path.rglob("*.txt"))
    assert len(found) == 4 and all(path.is_relative_to(tmp_path / "out") for path in found)


def test_damaged_archives(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\3\4 not an archive")
    with pytest.raises(ValueError, match=r"a.zip cannot be unpacked .*download it again"):
        unpack_zip(tmp_path / "a.zip", tmp_path / "out")
