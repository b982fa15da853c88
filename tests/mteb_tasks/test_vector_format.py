"""mteb runs with shorter and rounded embeddings are experiments: exact, and kept apart."""

from __future__ import annotations

import json
from pathlib import Path

import mteb
import numpy as np
import pytest
from mteb.cache import ResultCache
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

from mteb_tasks.loader import wrap
from mteb_tasks.models import metas
from mteb_tasks.scenes import ScenesShortT2IRetrieval
from mteb_tasks.vector_format import VectorFormat
from unime_st.data.items import Item

TEXTS = [f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("ring", "star", "circle")]


def _units(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_embeddings_are_truncated_and_rounded() -> None:
    model = SentenceTransformer("unime-tiny", device="cpu")
    whole = model.encode(TEXTS)
    items = [[Item(text) for text in TEXTS]]
    short = _units(whole[:, :64])
    np.testing.assert_allclose(wrap(model, truncate_dim=64).embed(items), short, atol=1e-6)
    signs = wrap(model, truncate_dim=64, precision="binary").embed(items)
    np.testing.assert_allclose(signs, np.where(short >= 0, 1, -1) / 8, atol=1e-6)
    rounded = wrap(model, truncate_dim=64, precision="int8").embed(items)
    low, high = short.min(axis=0), short.max(axis=0)
    levels = quantize_embeddings(short, "int8", ranges=np.stack([low, high])).astype(np.float32) + 128
    assert np.abs(rounded - _units(low + levels * (high - low) / 255)).max() < (high - low).max() / 255 + 1e-3
    assert 0 < np.abs(rounded - short).max() < (high - low).max() / 255 + 1e-3
    by_mteb = wrap(model, truncate_dim=64).embed(items, precision="int8")  # encode_kwargs={"precision": "int8"}
    np.testing.assert_array_equal(by_mteb, rounded)
    with pytest.raises(ValueError, match="truncate_dim=256: the embeddings have 128 dimensions"):
        wrap(model, truncate_dim=256).embed(items)
    with pytest.raises(ValueError, match="precision must be one of int8, binary, got 'int4'"):
        wrap(model, precision="int4")
    with pytest.raises(ValueError, match="truncate_dim"):
        VectorFormat(0)


def test_results_are_kept_apart(tmp_path: Path) -> None:
    model, task = SentenceTransformer("unime-tiny", device="cpu"), ScenesShortT2IRetrieval(size=20)
    scores = {}
    for options in ({}, {"truncate_dim": 4}, {"truncate_dim": 4, "precision": "binary"}):
        wrapped = wrap(model, "unime/tiny", "1", **options)
        result = mteb.evaluate(wrapped, task, cache=ResultCache(tmp_path), show_progress_bar=False)
        scores[wrapped.mteb_model_meta.experiment_name] = result.task_results[0].get_score()
    assert set(scores) == {None, "truncate_dim_4", "precision_binary__truncate_dim_4"}
    assert scores[None] > scores["precision_binary__truncate_dim_4"]
    files = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob(f"{task.metadata.name}.json")}
    assert set(files) == {"1", "truncate_dim_4", "precision_binary__truncate_dim_4"}


def test_the_environment_makes_an_experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNIME_TRUNCATE_DIM", "64")
    monkeypatch.setenv("UNIME_PRECISION", "int8")
    monkeypatch.setenv("UNIME_EMBEDDING_CACHE", "0")
    meta = metas()["unime-tiny"]
    assert meta.experiment_name == "precision_int8__truncate_dim_64"
    loaded = meta.load_model(device="cpu")
    assert loaded.embed([[Item("a red ring"), Item("a blue star")]]).shape == (2, 64)
    assert loaded.mteb_model_meta.experiment_name == meta.experiment_name
    monkeypatch.setenv("UNIME_TRUNCATE_DIM", "short")
    with pytest.raises(ValueError, match="UNIME_TRUNCATE_DIM must be a number of dimensions, got 'short'"):
        metas()
