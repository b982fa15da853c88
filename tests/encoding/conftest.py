"""Fixtures: tiny models of every family, as converted folders."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from unime_st import UniME


@pytest.fixture(scope="session")
def embedder(converted: Callable[[str], Path]) -> Callable[[str], UniME]:
    """Random model by the name of a recipe, in float32 on the CPU; one instance for all tests."""
    return cache(lambda name: UniME(converted(name), device="cpu"))
