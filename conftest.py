"""Pytest configuration of the whole repository: command-line options, threads per worker, surroundings of doctests."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

# Before anybody imports torch: with one worker per core, more threads would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parent


DATA = {
    "--golden": (ROOT.parent / "shared" / "golden", "reference outputs of the authors' code"),
    "--emoji": (ROOT.parent / "shared" / "data" / "emoji", "Parquet files of the emoji dataset"),
    "--mteb-source": (
        ROOT / "build" / f"mteb-{version('mteb')}",
        "source distribution of the installed mteb, unpacked as `make test` does it",
    ),
}
"""Options that name a folder with data outside the repository: default, and what it holds."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Folders with data that is not part of the repository."""
    group = parser.getgroup("unime-st")
    for name, (folder, content) in DATA.items():
        text = f"{content} (default: %(default)s); tests that need it are skipped where the folder does not exist"
        group.addoption(name, metavar="DIR", type=Path, default=folder, help=text)


@pytest.fixture(autouse=True)
def _doctest_surroundings(request: pytest.FixtureRequest) -> None:
    """An example in a docstring runs in an empty working directory, with an empty `UNIME_HOME`."""
    if isinstance(request.node, pytest.DoctestItem):
        folder = request.getfixturevalue("tmp_path")
        monkeypatch = request.getfixturevalue("monkeypatch")
        monkeypatch.chdir(folder)
        monkeypatch.setenv("UNIME_HOME", str(folder / "home"))
