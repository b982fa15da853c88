"""Fixtures shared by all rooms."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _first_existing(*candidates: Path) -> Path | None:
    return next((path for path in candidates if path.is_dir()), None)


@pytest.fixture(scope="session")
def golden() -> Path | None:
    """Folder with the numbers of the authors' code, or None where the checkout stands alone."""
    named = os.environ.get("UNIME_GOLDEN")
    return _first_existing(*([Path(named)] if named else []), ROOT.parent / "shared" / "golden")


@pytest.fixture(scope="session")
def emoji() -> Path | None:
    """Folder with the emoji Parquet files, or None where the checkout stands alone."""
    return _first_existing(ROOT.parent / "shared" / "data" / "emoji")
