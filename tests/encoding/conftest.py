"""Tiny models of every family, as folders that the converter made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tiny_checkpoints import FAMILIES

from unime_st import UniME
from unime_st.checkpoints import convert

CHECKPOINT_OF = {
    "unime-v2-2b": "qwen2-vl",
    "unime-v2": "llava-onevision",
    "unime-v1-llava1.6": "llava-1.6",
    "unime-v1-phi3.5": "phi3.5-v",
}
"""Released recipes squash images to 84 pixels here; bare ones keep their shape."""


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], UniME]:
    """Random model by the name of a recipe, in float32 on the CPU."""
    made: dict[str, UniME] = {}

    def get(name: str) -> UniME:
        if name not in made:
            checkpoint = CHECKPOINT_OF.get(name, name)
            bare = FAMILIES[checkpoint](tmp_path_factory.mktemp(checkpoint.replace(".", "_")))
            size = {"image_size": 84} if name in CHECKPOINT_OF else {}
            folder = convert(bare, name, output=tmp_path_factory.mktemp("native") / name, **size)
            made[name] = UniME(folder, device="cpu")
        return made[name]

    return get
