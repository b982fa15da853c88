"""Golden data of MMEB-V2: the part kept with the tests, and the full set where it is at hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer


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


@pytest.fixture(scope="session")
def golden_model(golden_v2: Path, tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    """The tiny checkpoint of the golden data as `unime-v2-2b`, whose recipe squashes images to a square."""
    from unime_st.checkpoints import convert

    (source,) = (golden_v2 / "checkpoints").iterdir()
    folder = convert(source, "unime-v2-2b", output=tmp_path_factory.mktemp("v2") / "model", dtype="float32")
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(scope="session")
def square_model(kept_golden: Path, tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    """The same checkpoint with a small square."""
    from unime_st.checkpoints import convert

    (source,) = (kept_golden / "v2" / "checkpoints").iterdir()
    folder = tmp_path_factory.mktemp("square") / "model"
    return SentenceTransformer(
        str(convert(source, "unime-v2-2b", output=folder, dtype="float32", image_size=112)), device="cpu"
    )
