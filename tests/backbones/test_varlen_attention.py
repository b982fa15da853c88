"""Variable-length attention equals sdpa of each sequence alone, for all ways to tell the sequences; gradients too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sentence_transformers import SentenceTransformer

from unime_st import UniME
from unime_st.backbones.fast_modules import use_fast_modules
from unime_st.backbones.varlen_attention import TORCH_FLASH, varlen_attention

LENGTHS = (3, 5, 3, 1)
CAUSAL: Any = SimpleNamespace(is_causal=True)
Get = Callable[[str], Path]


def states(batch: int, tokens: int, heads: tuple[int, int] = (4, 2)) -> list[torch.Tensor]:
    """Queries, keys and values in float64."""
    own = torch.Generator().manual_seed(0)
    made = (
        torch.randn(batch, count, tokens, 8, generator=own, dtype=torch.float64)
        for count in (heads[0], *heads[1:] * 2)
    )
    return [state.requires_grad_() for state in made]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, mask: torch.Tensor | None, **how: Any
) -> Any:
    """The function as a causal module calls it."""
    return varlen_attention(CAUSAL, query, key, value, mask, **how)


def alone(parts: list[torch.Tensor], lengths: tuple[int, ...], causal: bool) -> torch.Tensor:
    """Each sequence of one packed row by itself."""
    pieces = [
        F.scaled_dot_product_attention(*(part[None] for part in piece), is_causal=causal, enable_gqa=True)[0]
        for piece in zip(*(part[0].split(lengths, dim=1) for part in parts), strict=True)
    ]
    return torch.cat(pieces, dim=1).transpose(0, 1)[None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, (4, 4, 4), (7,)], ids=["several lengths", "one length", "one sequence"])
def test_packed_rows_with_boundaries(lengths: tuple[int, ...], causal: bool) -> None:
    parts = states(1, sum(lengths))
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    found, weights = attend(*parts, mask=None, is_causal=causal, cu_seq_lens_q=bounds)
    expected = alone(parts, lengths, causal)
    torch.testing.assert_close(found, expected)
    assert weights is None
    again = [part.detach().flip(2) for part in parts]  # the next layer, with the same boundaries
    torch.testing.assert_close(
        attend(*again, mask=None, is_causal=causal, cu_seq_lens_q=bounds)[0], alone(again, lengths, causal)
    )
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), parts), torch.autograd.grad(expected.square().sum(), parts)
    ):
        torch.testing.assert_close(ours, theirs)


def test_packed_rows_with_positions_that_restart() -> None:
    parts = states(1, sum(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    torch.testing.assert_close(attend(*parts, mask=None, position_ids=positions)[0], alone(parts, LENGTHS, True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(side: str) -> None:
    parts = states(len(LENGTHS), max(LENGTHS))
    steps, lengths = torch.arange(max(LENGTHS))[None], torch.tensor(LENGTHS)[:, None]
    mask = steps < lengths if side == "right" else steps >= max(LENGTHS) - lengths
    found = attend(*parts, mask=mask)[0]
    rows = [part.transpose(1, 2)[mask].transpose(0, 1)[None] for part in parts]
    torch.testing.assert_close(found[mask], alone(rows, LENGTHS, True)[0])
    assert not found[~mask].any()


def test_rows_without_padding_are_sequences() -> None:
    parts = states(2, 4)
    expected = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(attend(*parts, mask=None, position_ids=torch.arange(4)[None])[0], expected)


def test_a_sliding_window_is_refused_only_where_it_matters() -> None:
    parts = states(1, 4)
    attend(*parts, mask=None, sliding_window=4)
    with pytest.raises(ValueError, match=r"no sliding window.*3 tokens.*'sdpa'"):
        attend(*parts, mask=None, sliding_window=3)


@pytest.mark.parametrize(
    "name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "unime-v2-2b", "unime-v2", "llava-1.6", "unime-v1-phi3.5"]
)
def test_models_give_the_vectors_of_sdpa(converted: Get, name: str) -> None:
    """Of the vision tower by default; of the language model, too, where the user asks for it."""
    noise = np.random.default_rng(0)
    rows: list[Any] = [Image.fromarray(noise.integers(0, 255, (60, side, 3), dtype=np.uint8)) for side in (60, 90, 60)]
    rows += [{"image": [rows[0], rows[1]], "text": "both"}, "a text " * 9, "b"]
    stock = SentenceTransformer(str(converted(name)), device="cpu")
    expected = stock.encode(rows)
    for options, text in (({}, "sdpa"), ({"attn_implementation": TORCH_FLASH}, TORCH_FLASH)):
        model = UniME(converted(name), device="cpu", model_kwargs=options)
        config: Any = model[0].model.config
        if "qwen" in name or text == TORCH_FLASH:
            assert config.vision_config._attn_implementation == TORCH_FLASH
        assert config.get_text_config()._attn_implementation in (text, f"{text}_grouped")
        np.testing.assert_allclose(model.encode(rows), expected, atol=2e-5)
        np.testing.assert_allclose(
            SentenceTransformer(modules=list(model.children()), device="cpu").encode(rows), expected, atol=2e-5
        )


def test_a_cache_is_refused() -> None:
    query, key, value = states(1, 4)
    with pytest.raises(ValueError, match=r"no key-value cache.*'sdpa'"):
        attend(query[:, :, -1:], key, value, mask=None)


def test_other_implementations_stay() -> None:
    model = UniME("unime-tiny", device="cpu", model_kwargs={"attn_implementation": "eager"})
    use_fast_modules(model)
    assert model[0].model.config.vision_config._attn_implementation == "eager"
