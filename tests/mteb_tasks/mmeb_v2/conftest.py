"""Golden data of MMEB-V2: the full set where it is at hand, else the subset kept with the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

KEPT = Path(__file__).parents[2] / "golden" / "v2"


@pytest.fixture(scope="session", params=["kept", "full"])
def golden_v2(request: pytest.FixtureRequest, golden: Path | None) -> Path:
    """What the released evaluation code computed; tests run on the subset in the repository and on the full set."""
    if request.param == "kept":
        return KEPT
    full = golden.parent / "golden_v2" if golden else None
    if full is None or not full.is_dir():
        pytest.skip("the full golden data of MMEB-V2 are not at hand")
    return full
