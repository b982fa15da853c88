"""A tiny random embedder, and the authors' numbers that are kept with the tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mteb.models.model_implementations import MODEL_REGISTRY
from sentence_transformers import SentenceTransformer
from tiny_embedder import write_tiny_embedder

from mteb_tasks import register
from mteb_tasks.cli import main
from mteb_tasks.models import metas


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's caches out of the tests."""
    monkeypatch.setenv("UNIME_HOME", str(tmp_path_factory.getbasetemp() / "home"))


@pytest.fixture
def mteb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., Callable[..., str]]:
    """Set environment variables and make `mteb run` of this process: it gives what it wrote to standard output."""

    def with_variables(**variables: object) -> Callable[..., str]:
        for name, value in {"UNIME_HOME": tmp_path / "home", "MMEB_ALLOW_MISSING": 0, **variables}.items():
            monkeypatch.setenv(name, str(value))
        register()
        for name, meta in metas().items():  # the variables were not set when this process registered
            monkeypatch.setitem(MODEL_REGISTRY, name, meta)
            monkeypatch.setitem(MODEL_REGISTRY, meta.name, meta)

        def run(model: str, *arguments: str) -> str:
            monkeypatch.setattr(sys, "argv", [])
            main(["run", "-m", model, *arguments])
            return capsys.readouterr().out

        return run

    return with_variables


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a native SentenceTransformer with random weights that takes texts, images and both."""
    return write_tiny_embedder(tmp_path_factory.mktemp("embedder"), sides=(56, 56))


@pytest.fixture(scope="session")
def tiny(tiny_folder: str) -> SentenceTransformer:
    """The model in `tiny_folder`."""
    return SentenceTransformer(tiny_folder, device="cpu")


@pytest.fixture(scope="session")
def official(kept_golden: Path) -> Path:
    """Small evaluation sets, a checkpoint, and what the authors' code gave for them."""
    return kept_golden


@pytest.fixture(scope="session")
def released(official: Path, tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    """The authors' tiny checkpoint at their low resolution."""
    from unime_st.checkpoints import convert

    source = official / "checkpoints" / "tiny-unime-v2-qwen2vl"
    folder = tmp_path_factory.mktemp("released") / "model"
    made = convert(source, "unime-v2-2b", output=folder, image_size=128, dtype="float32")
    return SentenceTransformer(str(made), device="cpu")


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two small subsets of MMEB, OVEN and CIRR, in `$MMEB_EVAL_DIR`."""
    from benchmarks.synthetic_mmeb import write_synthetic_mmeb
    from mteb_tasks.mmeb.subsets import subset_named

    write_synthetic_mmeb(tmp_path, subsets=[subset_named("OVEN"), subset_named("CIRR")], queries=3, candidates=3)
    monkeypatch.setenv("MMEB_EVAL_DIR", str(tmp_path))
    return tmp_path
