"""Default prompts and similarity: every way of encoding applies what the model declares, as `encode` does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize

from unime_st import Item
from unime_st.data import PairRecord, RecordSet
from unime_st.encoding import VectorShards, encode_items, encode_stream, encode_to_shards
from unime_st.encoding.vector_shards import MemorySink
from unime_st.retrieval import mine, paired_similarity

TEXTS = ["a red circle", "a blue star", "a ring", "a small green cross"]


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    return SentenceTransformer(
        "unime-tiny", prompts={"query": "find this: "}, default_prompt_name="query", device="cpu"
    )


def test_functions_of_encoding(model: SentenceTransformer, tmp_path: Path):
    expected, plain = model.encode(TEXTS), model.encode(TEXTS, prompt="")
    assert np.abs(expected - plain).max() > 1e-2
    np.testing.assert_allclose(encode_items(model, map(Item, TEXTS)), expected, atol=1e-5)
    np.testing.assert_allclose(encode_items(model, TEXTS, prompt=""), plain, atol=1e-5)
    np.testing.assert_allclose(encode_items(model, TEXTS, prompt="x "), model.encode(TEXTS, prompt="x "), atol=1e-5)
    shards = encode_to_shards(model, map(Item, TEXTS), tmp_path / "vectors", show_progress_bar=False)
    np.testing.assert_allclose(shards[:], expected, atol=1e-5)
    sink = MemorySink()
    encode_stream(model, map(Item, TEXTS), sink, window=2)
    np.testing.assert_allclose(sink.tensor(), expected, atol=1e-5)


def pairs() -> list[PairRecord]:
    return [PairRecord(Item(text), Item(f"{text} on white")) for text in TEXTS]


def test_mining(model: SentenceTransformer, tmp_path: Path):
    records = RecordSet.write(tmp_path / "records", pairs(), {})
    pools = mine(records, model, tmp_path / "pools", num_candidates=2, max_similarity=None)
    queries, positives = model.encode(TEXTS), model.encode([f"{text} on white" for text in TEXTS])
    found = [pool.positive_similarity for pool in pools]
    np.testing.assert_allclose(found, paired_similarity(queries, positives), atol=2e-3)


@pytest.mark.parametrize("function", ["cosine", "dot", "euclidean"])
def test_similarity_follows_the_model(tmp_path: Path, function: str):
    model = SentenceTransformer("unime-tiny", device="cpu", similarity_fn_name=function)
    unnormalized = SentenceTransformer(
        modules=[module for module in model.children() if not isinstance(module, Normalize)],
        device="cpu",
        similarity_fn_name=function,
    )
    records = RecordSet.write(tmp_path / "records", pairs(), {})
    if function == "euclidean":
        with pytest.raises(ValueError, match="declares the similarity function 'euclidean'"):
            mine(records, unnormalized, tmp_path / "pools", num_candidates=2)
        return
    pools = mine(records, unnormalized, tmp_path / "pools", num_candidates=2, max_similarity=None)
    sides = unnormalized.encode(TEXTS), unnormalized.encode([f"{text} on white" for text in TEXTS])
    assert np.abs(np.linalg.norm(sides[0], axis=1) - 1).min() > 0.1
    expected = unnormalized.similarity_pairwise(*map(torch.as_tensor, sides)).numpy()
    np.testing.assert_allclose([pool.positive_similarity for pool in pools], expected, rtol=5e-3)
    lengths = np.linalg.norm(VectorShards(tmp_path / "pools" / "vectors")[:], axis=1)
    assert (np.abs(lengths - 1).max() < 1e-2) == (function == "cosine")
