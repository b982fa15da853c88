"""Pytest configuration of the whole repository: command-line options, threads per worker, surroundings of doctests."""

from __future__ import annotations

import os
from pathlib import Path

# Before anybody imports torch: with one worker per core, more threads would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Folders with data that is not part of the repository."""
    group = parser.getgroup("unime-st")
    group.addoption(
        "--golden",
        metavar="DIR",
        type=Path,
        default=ROOT.parent / "shared" / "golden",
        help="reference outputs of the authors' code (default: %(default)s); tests that need them are skipped "
        "where the folder does not exist",
    )
    group.addoption(
        "--emoji",
        metavar="DIR",
        type=Path,
        default=ROOT.parent / "shared" / "data" / "emoji",
        help="Parquet files of the emoji dataset (default: %(default)s); tests that need them are skipped where the "
        "folder does not exist",
    )
    group.addoption(
        "--mteb-source",
        metavar="DIR",
        type=Path,
        default=ROOT.parent / "shared" / "mteb",
        help="unpacked source distribution of the installed mteb (default: %(default)s), whose tests of commands and "
        "evaluation run with and without this package; skipped where the folder does not exist",
    )


@pytest.fixture(autouse=True)
def _doctest_surroundings(request: pytest.FixtureRequest) -> None:
    """An example in a docstring runs in an empty working directory, with an empty `UNIME_HOME`."""
    if isinstance(request.node, pytest.DoctestItem):
        folder = request.getfixturevalue("tmp_path")
        monkeypatch = request.getfixturevalue("monkeypatch")
        monkeypatch.chdir(folder)
        monkeypatch.setenv("UNIME_HOME", str(folder / "home"))
