"""Fixtures shared by all rooms: reference data, tiny checkpoints of every family and their converted folders."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tqdm.auto
from filelock import FileLock

# `--doctest-modules` takes every file for a module; files of the same name in several folders are not importable.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]
KEPT_GOLDEN = Path(__file__).resolve().parent / "golden"

Make = Callable[[Path], object]

# Some tests fork and kill the child. tqdm's own lock is shared between processes: a child that is killed while it draws
# would keep it for ever, and its monitor thread could hold it at the fork.
for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):
    bar.set_lock(threading.RLock())
    bar.monitor_interval = 0


def _existing(config: pytest.Config, option: str) -> Path:
    folder = Path(config.getoption(option))
    if not folder.is_dir():
        pytest.skip(f"no data for {option}: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def golden(pytestconfig: pytest.Config) -> Path:
    """Folder with the reference outputs of the authors' code (`--golden`); without it the test is skipped."""
    return _existing(pytestconfig, "--golden")


@pytest.fixture(scope="session")
def kept_golden() -> Path:
    """The part of the reference outputs that is kept with the tests: losses, selection, evaluation."""
    return KEPT_GOLDEN


@pytest.fixture(scope="session", params=["kept", "full"])
def golden_cases(request: pytest.FixtureRequest) -> Path:
    """The reference outputs twice: the part kept with the tests, then all of them (skipped where absent)."""
    return request.getfixturevalue("kept_golden" if request.param == "kept" else "golden")


@pytest.fixture(scope="session")
def emoji(pytestconfig: pytest.Config) -> Path:
    """Folder with the Parquet files of the emoji dataset (`--emoji`); without it the test is skipped."""
    return _existing(pytestconfig, "--emoji")


@pytest.fixture(scope="session")
def mteb_source(pytestconfig: pytest.Config) -> Path:
    """Source distribution of mteb (`--mteb-source`); without it the test is skipped."""
    return _existing(pytestconfig, "--mteb-source")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Make], Path]:
    """Makes a folder once per run: the first worker that asks makes it, the others wait. Read-only for tests."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    base = base / "shared"
    base.mkdir(exist_ok=True)

    def get(name: str, make: Make) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def checkpoint(shared_folder: Callable[[str, Make], Path]) -> Callable[[str], Path]:
    """Folder of a tiny random checkpoint as its publisher lays it out, by the name of a bare or released recipe."""
    from tiny_checkpoints import FAMILIES, FAMILY_OF

    def get(name: str) -> Path:
        family = FAMILY_OF.get(name, name)
        return shared_folder(f"checkpoint-{family}", FAMILIES[family])

    return get


@pytest.fixture(scope="session")
def converted(checkpoint: Callable[[str], Path], shared_folder: Callable[[str, Make], Path]) -> Callable[[str], Path]:
    """Native folder of a tiny checkpoint by the name of a recipe; released recipes squash images to 84 pixels."""
    from tiny_checkpoints import FAMILY_OF

    from unime_st.checkpoints import convert

    def get(name: str) -> Path:
        size = {"image_size": 84} if name in FAMILY_OF else {}
        return shared_folder(
            f"converted-{name}", lambda folder: convert(checkpoint(name), name, output=folder, **size)
        )

    return get
