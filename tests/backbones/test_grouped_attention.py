"""Grouped-query attention with a mask: the values and gradients of stock sdpa, on repeated keys and values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from unime_st import UniME
from unime_st.backbones import grouped_attention as grouped
from unime_st.backbones.fast_modules import use_fast_modules
from unime_st.backbones.grouped_attention import SDPA_GROUPED, grouped_attention
from unime_st.backbones.varlen_attention import TORCH_FLASH
from unime_st.scoring.loading import load_cross_encoder

LAYER: Any = SimpleNamespace(num_key_value_groups=3, is_causal=True)


def states(keys: int, tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    options: Any = {"dtype": torch.float64, "requires_grad": True}
    query = torch.randn(4, 6, tokens, 8, **options)
    return query, torch.randn(4, 2, keys, 8, **options), torch.randn(4, 2, keys, 8, **options)


@pytest.mark.parametrize("keys", [5, 9])
@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_value_and_gradient_are_those_of_sdpa(keys: int, kind: torch.dtype) -> None:
    """With keys of a cache before those of the tokens, too."""
    mask = torch.ones(5, keys, dtype=torch.bool).tril(keys - 5).repeat(4, 1, 1, 1)
    mask[1, ..., :2] = False
    mask[..., -1] = True  # no row without a key
    given = mask if kind is torch.bool else torch.zeros(mask.shape, dtype=kind).masked_fill(~mask, -torch.inf)
    found = []
    for attend in (sdpa_attention_forward, grouped_attention):
        parts = states(keys)
        out, weights = attend(LAYER, *parts, given, scaling=0.3)  # type: ignore[operator]
        assert weights is None and out.shape == (4, 5, 6, 8) and out.is_contiguous()
        out.pow(3).sum().backward()
        found.append((out, *(part.grad for part in parts)))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_keys_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is the one for groups: the fallback of torch would repeat them itself."""
    monkeypatch.setattr(grouped, "sdpa_attention_forward", None)
    mask = torch.ones(4, 1, 5, 5, dtype=torch.bool).tril()
    profiling = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with torch.no_grad(), profiling as profile:
        grouped_attention(LAYER, *states(5), mask)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert not names & {"aten::repeat_interleave", "aten::_scaled_dot_product_attention_math"}


def test_without_a_mask_it_is_causal() -> None:
    parts = states(5)
    found, expected = (f(LAYER, *parts, None)[0] for f in (grouped_attention, sdpa_attention_forward))
    assert torch.equal(found, expected)
    triangle = torch.ones(4, 1, 5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(found, grouped_attention(LAYER, *parts, triangle)[0])


def test_special_arguments_are_those_of_sdpa() -> None:
    mask = torch.ones(4, 1, 5, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="softcap"):
        grouped_attention(LAYER, *states(5), mask, softcap=1.0)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen3-vl", "unime-v2-2b", "llava-1.6"])
def test_models_give_the_vectors_of_sdpa(converted: Callable[[str], Path], name: str) -> None:
    texts = ["a red circle", "b", "a text of several words " * 5]
    stock = SentenceTransformer(str(converted(name)), device="cpu")
    model = UniME(converted(name), device="cpu")
    config = model.transformers_model.config.get_text_config()
    shares = config.num_key_value_heads < config.num_attention_heads
    assert config._attn_implementation == (SDPA_GROUPED if shares else "sdpa")
    np.testing.assert_allclose(model.encode(texts), stock.encode(texts), atol=2e-6)


def test_it_is_used_and_not_saved(tmp_path: Path) -> None:
    judge = load_cross_encoder("unime-tiny", template="tiny")
    assert judge[0].model.config.get_text_config()._attn_implementation == SDPA_GROUPED
    UniME("unime-tiny", device="cpu").save_pretrained(str(tmp_path))
    assert all(SDPA_GROUPED not in file.read_text() for file in tmp_path.rglob("*.json"))


def test_the_flash_kernel_can_follow() -> None:
    """As benchmarks/gpu.py asks for it, of a model that has this attention already."""
    model = UniME("unime-tiny", device="cpu")
    use_fast_modules(model, everywhere=True)
    assert model.transformers_model.config.get_text_config()._attn_implementation == TORCH_FLASH


def test_other_implementations_stay() -> None:
    model = UniME("unime-tiny", device="cpu", model_kwargs={"attn_implementation": "eager"})
    use_fast_modules(model)
    assert model.transformers_model.config.get_text_config()._attn_implementation == "eager"
    layers = nn.Sequential(nn.Linear(2, 2))
    use_fast_modules(layers)
    assert not hasattr(layers[0], "config")
