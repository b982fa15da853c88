"""`UniME.encode` equals `SentenceTransformer.encode` with a batch size of one, for every model family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from unime_st import Item, UniME
from unime_st.encoding import encode_items
from unime_st.encoding.engine import _MIN_TEXTS
from unime_st.encoding.text_fast_path import TextFastPath

Get = Callable[[str], UniME]
FAMILIES = ["qwen2-vl", "qwen2.5-vl", "llava-1.6", "llava-onevision", "unime-v2-2b", "unime-v2", "unime-v1-llava1.6"]
FAMILIES += ["unime-v1-phi3.5"]


def make_image(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def inputs() -> list[Any]:
    chat = [{"role": "user", "content": [{"type": "image", "image": make_image(0)}, {"type": "text", "text": "what"}]}]
    some: list[Any] = [f"text {number} " + "word " * (number % 7) for number in range(70)]
    some += [
        make_image(0),
        make_image(1, 40, 150),
        {"image": make_image(2), "text": "both"},
        {"text": "a"},
        " padded\n",
        chat,
    ]
    return [
        *some,
        {"image": [make_image(3), make_image(4, 60, 90)], "text": "two"},
        some[0],
        make_image(0),
        {"text": "a"},
    ]


def one_by_one(model: SentenceTransformer, rows: list[Any], **options: Any) -> np.ndarray:
    return SentenceTransformer.encode(_plain(model), rows, batch_size=1, **options)


def _plain(model: SentenceTransformer) -> SentenceTransformer:
    return SentenceTransformer(modules=list(model.children()), prompts=model.prompts, device="cpu")


@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_equal_those_of_single_inputs(embedder: Get, name: str):
    model, rows = embedder(name), inputs()
    expected = one_by_one(model, rows)
    for options in ({}, {"token_budget": 300, "workers": 3}):
        found = model.encode(rows) if not options else encode_items(model, rows, **options)
        cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosine.min() >= 0.99999
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prompt", [None, "Find: "])
def test_text_fast_path_equals_preprocess(embedder: Get, name: str, prompt: str | None):
    model = embedder(name)
    path = TextFastPath(model, prompt)
    assert path.usable, "the fast path must support the released families"
    some = ["x", "é ☃", "two\nlines", "end. ", "{{ messages }}", "word " * 90]
    rows = path.tokens(some)
    assert all(row is not None for row in rows)
    made, expected = path.features(rows), model.preprocess(some, prompt=prompt)
    assert made.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(made[key], value) if torch.is_tensor(value) else made[key] == value
    special = next(token.content for token in model.tokenizer.added_tokens_decoder.values() if token.special)
    assert path.tokens([f"a {special} b", "<|image_1|> what"]) == [None] * 2
    model_max_length, limit = model.tokenizer.model_max_length, model.max_seq_length
    try:
        model.max_seq_length = 100
        assert TextFastPath(model, prompt).tokens(["word " * 90]) == [None]
        model.max_seq_length = 16
        short = TextFastPath(model, prompt)
        assert not short.usable or short.tokens(["word " * 90]) == [None]
        texts = ["word " * number for number in range(_MIN_TEXTS)]
        np.testing.assert_allclose(
            encode_items(model, texts, prompt=prompt), model.encode(texts, prompt=prompt), atol=2e-5
        )
    finally:
        model.max_seq_length = limit
        model.tokenizer.model_max_length = model_max_length


def test_text_fast_path_is_off_for_templates_that_change_texts(embedder: Get):
    model = embedder("qwen2-vl")
    template = model.processor.chat_template
    try:
        model.processor.chat_template = template.replace("c.text", "c.text | upper")
        assert not TextFastPath(model).usable
        words = [f"word {number}" for number in range(_MIN_TEXTS)]
        np.testing.assert_allclose(model.encode(words), one_by_one(model, words), atol=2e-5)
        assert not np.allclose(model.encode("word"), embedder("qwen2.5-vl").encode("word"))
    finally:
        model.processor.chat_template = template


OPTIONS: list[dict[str, Any]] = [
    {"prompt": "Find: "},
    {"truncate_dim": 8, "normalize_embeddings": True},
    {"precision": "int8"},
    {"precision": "ubinary"},
    {"convert_to_tensor": True},
    {"convert_to_numpy": False},
    {"output_value": "token_embeddings"},
    {"normalize_embeddings": True, "batch_size": 3},
    {"processing_kwargs": {"text": {"max_length": 24, "truncation": True}}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_options_of_encode(embedder: Get, options: dict[str, Any]):
    model = embedder("unime-v2-2b")
    rows = inputs()[60:72]
    if "processing_kwargs" in options:
        rows = [f"text {number}" + " word" * 20 for number in range(70)]
    expected, found = _plain(model).encode(rows, **options), model.encode(rows, **options)
    assert type(found) is type(expected) and len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.dtype == other.dtype
        assert np.abs(np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)).max() <= (
            1 if "precision" in options else 2e-5
        )


def test_prompts_by_name_queries_and_documents(embedder: Get):
    model = embedder("unime-v2-2b")
    plain, rows = _plain(model), inputs()[:75]
    name = next(iter(model.prompts))
    for method in ("encode_query", "encode_document"):
        np.testing.assert_allclose(getattr(model, method)(rows), getattr(plain, method)(rows), atol=2e-5)
    np.testing.assert_allclose(model.encode(rows, prompt_name=name), plain.encode(rows, prompt_name=name), atol=2e-5)
    assert model.encode([]).shape == plain.encode([]).shape
    assert model.encode("one").shape == plain.encode("one").shape
    assert model.encode(np.array(["one", "two"])).shape == (2, 32)


@pytest.mark.distributed
@pytest.mark.slow
def test_items_and_pool_of_processes(embedder: Get):
    model = embedder("unime-v2")
    rows = [*inputs()[66:72], Item("an item"), Item("an item"), Item("both", make_image(5))]
    expected = model.encode(rows)
    np.testing.assert_array_equal(expected[6], expected[7])
    np.testing.assert_allclose(model.encode(rows, device=["cpu"], chunk_size=3), expected, atol=2e-5)


def test_threads_do_not_interfere(embedder: Get):
    """A fast tokenizer stores padding and truncation as state."""
    model = embedder("unime-v2-2b")
    rows = [{"image": make_image(number), "text": "word " * (number % 11)} for number in range(24)]
    before = torch.get_num_threads()
    expected = one_by_one(model, rows)
    for _ in range(2):
        np.testing.assert_allclose(encode_items(model, rows, token_budget=120, workers=4), expected, atol=2e-5)
    assert torch.get_num_threads() == before
