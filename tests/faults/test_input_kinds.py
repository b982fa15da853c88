"""Input kinds: Series, iterators and arrays are lists, tables and single inputs are refused, folders say what they hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image
from sentence_transformers import CrossEncoder, SentenceTransformer

from unime_st import Item, UniME, UniMEReranker
from unime_st.data import BadImageError, PairRecord
from unime_st.encoding import encode_items
from unime_st.judging import Group, LocalJudge
from unime_st.retrieval import Index

TEXTS = ["a red circle", "a blue star"]
LISTS: dict[str, Callable[[], Any]] = {
    "tuple": lambda: tuple(TEXTS),
    "generator": lambda: (text for text in TEXTS),
    "Series": lambda: pd.Series(TEXTS, index=[5, 9]),
    "array": lambda: np.array(TEXTS),
    "array of objects": lambda: np.array(TEXTS, dtype=object),
    "Arrow": lambda: pa.array(TEXTS),
}


@pytest.fixture(scope="module")
def model() -> UniME:
    return UniME("unime-tiny", device="cpu")


@pytest.fixture(scope="module")
def reranker() -> UniMEReranker:
    return UniMEReranker("unime-tiny", device="cpu")


def functions(model: UniME, reranker: UniMEReranker) -> dict[str, Callable[[Any], Any]]:
    """Functions of a list of texts, with comparable results."""
    index = Index.build(TEXTS, model)
    return {
        "encode": model.encode,
        "encode_query": model.encode_query,
        "encode_items": lambda texts: encode_items(model, texts),
        "rank": lambda texts: [entry["score"] for entry in reranker.rank("q", texts)],
        "rank listwise": lambda texts: [entry["score"] for entry in reranker.rank("q", texts, method="listwise")],
        "listwise_scores": lambda texts: reranker.listwise_scores("q", texts),
        "judge": lambda texts: LocalJudge(reranker).score([Group("q", texts)])[0],
        "Index.build": lambda texts: [hit.score for hit in Index.build(texts, model).search(["a star"], k=2)[0]],
        "Index.search": lambda texts: [hit.score for hits in index.search(texts, k=2) for hit in hits],
    }


@pytest.mark.parametrize("kind", LISTS)
def test_inputs_like_lists(model: UniME, reranker: UniMEReranker, kind: str):
    for name, function in functions(model, reranker).items():
        value = [str(text) for text in LISTS[kind]()] if kind == "Arrow" and name == "judge" else LISTS[kind]()
        assert np.allclose(function(value), function(TEXTS), atol=1e-5), name


@pytest.mark.parametrize("kind", ["generator", "Series", "tuple"])
def test_pairs_like_lists(reranker: UniMEReranker, kind: str):
    pairs = [("q", text) for text in TEXTS]
    values = {"generator": iter(pairs), "Series": pd.Series(pairs, index=[3, 4]), "tuple": tuple(pairs)}
    assert np.allclose(reranker.predict(values[kind]), reranker.predict(pairs), atol=1e-6)


@pytest.mark.parametrize(
    "value", ["abc", {"text": "a"}, pd.DataFrame({"text": TEXTS}), 5], ids=lambda v: type(v).__name__
)
def test_single_inputs_and_tables_are_refused(model: UniME, reranker: UniMEReranker, value: Any):
    for name in ("encode_items", "rank", "listwise_scores", "Index.build", "Index.search"):
        with pytest.raises(TypeError, match="expected"):
            functions(model, reranker)[name](value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, reranker: Index.build(TEXTS, model).search(["a"], k=True), "k must be at least 1, got True"),
        (lambda model, reranker: Index.build(TEXTS, model).search(["a"], k=1.5), "k must be at least 1, got 1.5"),
        (lambda model, reranker: model.encode(["a"], prompt=5), "prompt must be a text or None, got 5"),
        (lambda model, reranker: PairRecord("q", Item("p")), "a record holds items, got 'q'"),
        (lambda model, reranker: PairRecord(Item("q"), Item("p"), [Item("n")]), "dataset must be the name"),
        (lambda model, reranker: PairRecord(Item("q"), Item("p"), negatives=None), "negatives must be a tuple"),
    ],
)
def test_arguments_of_a_wrong_kind(model: UniME, reranker: UniMEReranker, call: Callable[..., Any], message: str):
    with pytest.raises(ValueError, match=message):
        call(model, reranker)


def test_missing_texts_of_a_frame_are_absent_in_the_reranker(reranker: UniMEReranker):
    image = Image.new("RGB", (56, 56), "red")
    expected = [entry["score"] for entry in reranker.rank({"image": image}, TEXTS)]
    for missing in (None, float("nan"), pd.NA):
        found = reranker.rank({"image": image, "text": missing}, TEXTS)
        assert np.allclose([entry["score"] for entry in found], expected)
        pairs = [({"image": image, "text": missing}, TEXTS[0])]
        assert np.allclose(reranker.predict(pairs), reranker.predict([({"image": image}, TEXTS[0])]))


def test_folders_of_another_kind_are_refused(
    tmp_path: Path, converted: Callable[[str], Path], reranker: UniMEReranker
):
    reranker.save_pretrained(str(tmp_path / "reranker"))
    for folder in (tmp_path / "reranker", converted("unime-v2-reranker")):
        for kind in (SentenceTransformer, UniME):
            with pytest.raises(ValueError, match="holds a reranker, not an embedding model"):
                kind(str(folder))
        CrossEncoder(str(folder))
    for name in ("unime-tiny", str(converted("unime-v2-2b"))):
        with pytest.raises(ValueError, match="holds an embedding model, not a reranker"):
            CrossEncoder(name)


@pytest.mark.parametrize("kind", ["garbage", "animation", "truncated"])
@pytest.mark.slow
def test_plain_class_names_files_that_transformers_cannot_decode(tmp_path: Path, kind: str):
    path = tmp_path / "image.gif"
    frames = [Image.effect_noise((200, 200), 50).convert("RGB") for _ in range(2)]
    if kind == "animation":
        frames[0].save(path, save_all=True, append_images=frames[1:])
    else:
        path = path.with_suffix(".jpg")
        frames[0].save(path)
        path.write_bytes(b"garbage" if kind == "garbage" else path.read_bytes()[:500])
    with pytest.raises(BadImageError, match=str(path)):
        SentenceTransformer("unime-tiny", device="cpu").encode(["a", {"image": str(path)}])
