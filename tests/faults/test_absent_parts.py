"""Absent parts: None in a dict, struct or chat is absent in every class, and an input with nothing left is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sentence_transformers import CrossEncoder, SentenceTransformer

from unime_st import UniME, UniMEReranker
from unime_st.encoding import encode_items

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
FAMILIES = ["qwen2-vl", "llava-onevision", "unime-v2-2b", "unime-v2", "unime-v1-llava1.6", "unime-v1-phi3.5"]
EQUAL: dict[str, tuple[Any, Any]] = {
    "no text": ({"image": IMAGE, "text": None}, {"image": IMAGE}),
    "no image": ({"image": None, "text": "a star"}, {"text": "a star"}),
    "NaN of pandas": ({"image": IMAGE, "text": float("nan")}, {"image": IMAGE}),
    "NA of pandas": ({"text": "a star", "image": pd.NA}, {"text": "a star"}),
    "one of two images": ({"image": [None, IMAGE], "text": "a star"}, {"image": IMAGE, "text": "a star"}),
    "empty struct of datasets": ({"image": {"bytes": None, "path": None}, "text": "a star"}, {"text": "a star"}),
    "part of a chat": (
        [{"role": "user", "content": [{"type": "text", "text": None}, {"type": "image", "image": IMAGE}]}],
        [{"role": "user", "content": [{"type": "image", "image": IMAGE}]}],
    ),
}
NOTHING: dict[str, Any] = {
    "None": None,
    "NaN": float("nan"),
    "text None": {"text": None},
    "both None": {"text": None, "image": None},
    "empty list": {"image": [None]},
    "chat": [{"role": "user", "content": [{"type": "text", "text": None}]}],
}


@pytest.fixture(scope="module")
def unime() -> UniME:
    return UniME("unime-tiny", device="cpu")


@pytest.mark.parametrize("name", EQUAL)
def test_absent_part_does_not_change_the_vector(unime: UniME, name: str):
    given, expected = EQUAL[name]
    np.testing.assert_allclose(unime.encode([given]), unime.encode([expected]), atol=1e-6)
    features = unime.preprocess([given])
    np.testing.assert_array_equal(features["input_ids"], unime.preprocess([expected])["input_ids"])


@pytest.mark.parametrize("name", NOTHING)
def test_input_without_content_is_refused_by_name(unime: UniME, name: str):
    with pytest.raises(ValueError, match=r"item 1: the (input|message) (is|has neither)"):
        unime.encode(["fine", NOTHING[name]])
    vectors, mask = encode_items(unime, ["fine", NOTHING[name]], on_error="skip")
    assert mask.tolist() == [True, False] and np.isnan(vectors[1]).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_class_with_our_templates(converted: Callable[[str], Path], name: str):
    plain = SentenceTransformer(str(converted(name)), device="cpu")
    with_none, without, word = ({"image": IMAGE, **text} for text in ({"text": None}, {}, {"text": "None"}))
    for batch in ([with_none], [with_none, "a star"], [with_none, with_none]):
        np.testing.assert_allclose(plain.encode(batch)[0], plain.encode([without])[0], atol=1e-5)
    assert np.abs(plain.encode([with_none]) - plain.encode([word])).max() > 1e-3
    if name.startswith("unime"):  # other processors are transformers' own, and raise an error
        np.testing.assert_allclose(plain.encode([{"image": None, "text": "a"}]), plain.encode(["a"]), atol=1e-5)


def test_embedded_model():
    plain = SentenceTransformer("unime-tiny", device="cpu")
    vectors = plain.encode([{"image": IMAGE, "text": None}, {"image": IMAGE}])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


def test_plain_cross_encoder(tmp_path: Path):
    UniMEReranker("unime-tiny", template="tiny", device="cpu").save_pretrained(str(tmp_path / "reranker"))
    plain = CrossEncoder(str(tmp_path / "reranker"), device="cpu")
    scores = plain.predict([({"image": IMAGE, "text": None}, "a star"), ({"image": IMAGE}, "a star")])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)


def test_rows_of_a_dataset_and_of_a_frame(unime: UniME):
    rows: list[dict[str, Any]] = [{"text": "a star", "image": None}, {"text": None, "image": IMAGE}]
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    expected = unime.encode(["a star", IMAGE])
    np.testing.assert_allclose(unime.encode(datasets.Dataset.from_list(rows, features=features)), expected, atol=1e-6)
    np.testing.assert_allclose(unime.encode(pd.DataFrame(rows).to_dict("records")), expected, atol=1e-6)
