"""Golden data of MMEB-V2: the part kept with the tests, and the full set where it is at hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session", params=["kept", "full"])
def golden_v2(request: pytest.FixtureRequest) -> Path:
    """What the released evaluation code computed: the part kept with the tests, then all of it (skipped where absent)."""
    if request.param == "kept":
        return request.getfixturevalue("kept_golden") / "v2"
    full = request.getfixturevalue("golden").parent / "golden_v2"
    if not full.is_dir():
        pytest.skip(f"no golden data of MMEB-V2: {full} does not exist")
    return full


@pytest.fixture
def mini(kept_golden: Path, tmp_path: Path) -> Path:
    """A copy of the kept mini sets, to be damaged."""
    root = tmp_path / "data"
    shutil.copytree(kept_golden / "v2" / "data", root)
    return root
