"""One-dimensional image positions of UniME-V2 on Qwen2-VL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor, Qwen2VLModel

from unime_st.backbones.qwen import UniMEQwen2VLConfig, UniMEQwen2VLModel, UniMEQwen2VLProcessor
from unime_st.checkpoints import convert
from unime_st.checkpoints.checks import sample_image

ROWS = [
    {"image": sample_image(90, 60), "text": "\nWhat?\n"},
    {"text": "words"},
    {"image": sample_image(60, 140), "text": "x " * 9},
]


@pytest.fixture(scope="module")
def source(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen2-vl")


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    return convert(source, "unime-v2-2b", output=out, image_size="native")


def native(source: Path, features: dict, *, flat: bool) -> np.ndarray:
    """transformers' own model, with explicit positions in the flat case."""
    model = Qwen2VLModel.from_pretrained(source).eval()
    inputs = {key: features[key] for key in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
    if flat:
        count = (features["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        inputs["position_ids"] = count.expand(3, *count.shape)
    else:
        inputs["mm_token_type_ids"] = features["mm_token_type_ids"]
    with torch.no_grad():
        last = model(**inputs).last_hidden_state[:, -1]
    return torch.nn.functional.normalize(last, dim=-1).numpy()


def test_auto_classes_know_the_model_type(folder: Path) -> None:
    assert type(AutoModel.from_pretrained(folder)) is UniMEQwen2VLModel
    assert type(AutoProcessor.from_pretrained(folder)) is UniMEQwen2VLProcessor
    assert UniMEQwen2VLConfig.model_type == "unime_qwen2_vl"


def test_positions_count_every_token_alone_and_left_padded(source: Path, folder: Path) -> None:
    model = SentenceTransformer(str(folder), device="cpu")
    features = model.preprocess(ROWS)
    assert not features["attention_mask"].all(), "rows of different length, padded on the left"
    expected = native(source, features, flat=True)
    assert np.abs(model.encode(ROWS, batch_size=3) - expected).max() < 1e-5
    assert np.abs(np.stack([model.encode(row) for row in ROWS]) - expected).max() < 1e-5
    assert np.abs(native(source, features, flat=False) - expected)[[0, 2]].max() > 1e-2, "the positions matter"


def test_an_earlier_batch_leaves_no_trace(folder: Path) -> None:
    model = SentenceTransformer(str(folder), device="cpu")
    first = model.encode(ROWS[:1])
    model.encode(ROWS)
    np.testing.assert_allclose(model.encode(ROWS[:1]), first, atol=1e-6)


def test_native_scheme_stays_where_the_recipe_says_so(source: Path, tmp_path: Path) -> None:
    out = convert(source, "qwen2-vl", output=tmp_path / "m", image_size=84)
    model = SentenceTransformer(str(out), device="cpu")
    assert type(model[0].model) is UniMEQwen2VLModel
    assert model[0].model.config.image_positions == "3d"
    features = model.preprocess(ROWS)
    assert np.abs(model.encode(ROWS, batch_size=3) - native(source, features, flat=False)).max() < 1e-5
