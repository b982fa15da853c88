"""Packed batches give the same vectors as padded ones, for every model family."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from unime_st import UniME
from unime_st.encoding.batch_runner import BatchRunner
from unime_st.encoding.engine import encode_into
from unime_st.encoding.vector_shards import MemorySink

Get = Callable[[str], UniME]
FAMILIES = ["qwen2-vl", "qwen2.5-vl", "llava-1.6", "llava-onevision", "unime-v2-2b", "unime-v2", "unime-v1-llava1.6"]
FAMILIES += ["unime-v1-phi3.5"]


def make_image(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def rows() -> list[Any]:
    some: list[Any] = [f"text {number} " + "word " * number for number in range(9)]
    some += [make_image(0), make_image(1, 40, 150), {"image": make_image(2), "text": "both"}, {"text": "a"}]
    return [*some, {"image": [make_image(3), make_image(4, 60, 90)], "text": "two"}]


def one_by_one(model: SentenceTransformer) -> np.ndarray:
    plain = SentenceTransformer(modules=list(model.children()), device="cpu")
    return plain.encode(rows(), batch_size=1)


def embedded(model: SentenceTransformer, **how: Any) -> tuple[np.ndarray, list[list[int]]]:
    """Vectors, and the sequence lengths in every forward pass."""
    sequences: list[list[int]] = []

    def seen(module: torch.nn.Module, given: tuple[dict[str, Any]]) -> None:
        assert "attention_mask" not in given[0] and len(given[0]["token_embeddings"]) == 1
        sequences.append(given[0]["cu_seq_lens_q"].diff().tolist())
        assert sum(sequences[-1]) == given[0]["token_embeddings"].shape[1], "no token is padding"

    hook, results = model[1].register_forward_pre_hook(seen), MemorySink()
    try:
        assert not encode_into(model, rows(), results, on_error="raise", token_budget=600, workers=2, **how)
    finally:
        hook.remove()
    return results.tensor().numpy(), sequences


@pytest.mark.parametrize("name", FAMILIES)
def test_with_sdpa_rows_are_masked_from_one_another(embedder: Get, name: str):
    model = embedder(name)
    assert not BatchRunner(model).packed
    vectors, sequences = embedded(model, packed=True)
    lengths = [int(model.preprocess([row])["attention_mask"].sum()) for row in rows()]
    assert sorted(itertools.chain.from_iterable(sequences)) == sorted(lengths) and max(map(len, sequences)) > 3
    np.testing.assert_allclose(vectors, one_by_one(model), atol=2e-5)


def row_by_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Reference implementation of variable-length attention with the arguments that transformers passes."""
    assert attention_mask is None
    starts, length = given.get("cu_seq_lens_q"), query.shape[2]
    if starts is None and (positions := given.get("position_ids")) is not None and len(query) == 1:
        starts = torch.cat([(positions[0] == 0).nonzero().flatten(), torch.tensor([length])])
    starts = [0, length] if starts is None else starts.tolist()
    causal = given.get("is_causal")
    found = [
        torch.nn.functional.scaled_dot_product_attention(
            *(part[:, :, begin:end] for part in (query, key, value)),
            is_causal=module.is_causal if causal is None else causal,
            scale=given.get("scaling"),
            enable_gqa=True,
        )
        for begin, end in itertools.pairwise(starts)
    ]
    return torch.cat(found, dim=2).transpose(1, 2), None


@pytest.fixture
def flash() -> Iterator[str]:
    """Name of a registered CPU implementation of variable-length attention; flash attention needs a GPU."""
    name = "flash_attention_by_rows"
    AttentionInterface.register(name, row_by_row)
    AttentionMaskInterface.register(name, flash_attention_mask)
    yield name
    del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_with_flash_attention_packing_is_the_default(embedder: Get, flash: str, name: str):
    model = embedder(name)
    expected, config = one_by_one(model), model[0].model.config
    before = config._attn_implementation
    config._attn_implementation = flash  # of all its parts; set_attn_implementation would look for a kernel
    try:
        assert BatchRunner(model).packed and not BatchRunner(model, packed=False).packed
        vectors, sequences = embedded(model)
    finally:
        config._attn_implementation = before
    assert max(map(len, sequences)) > 3
    np.testing.assert_allclose(vectors, expected, atol=2e-5)
