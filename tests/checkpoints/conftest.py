"""Tiny checkpoints and what the converter makes of them, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_checkpoints import FAMILIES, FAMILY_OF

from unime_st.checkpoints import convert


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random checkpoint by the name of its bare recipe."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = FAMILIES[name](tmp_path_factory.mktemp(name.replace(".", "_")))
        return made[name]

    return get


@pytest.fixture(scope="session")
def native(bare: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Converted folder by the name of a recipe; released recipes squash images to 84 pixels."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp("native") / name
            size = {"image_size": 84} if name in FAMILY_OF else {}
            made[name] = convert(bare(FAMILY_OF.get(name, name)), name, output=out, **size)
        return made[name]

    return get
