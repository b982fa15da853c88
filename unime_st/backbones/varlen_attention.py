"""Variable-length attention: one call for all sequences of a packed row, flash attention of torch on CUDA.

Registered in transformers as ``"torch_flash"``. The vision towers of the Qwen families put all images of a batch in one
row, and stock sdpa attends to them in a loop. On CUDA in 16 bits this implementation calls the variable-length flash
kernel that comes with torch (the package ``flash-attn`` is not needed); elsewhere it makes one call of sdpa for all
sequences of the same length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

TORCH_FLASH = "torch_flash"


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers, in which sequences do not attend to one another.

    Args:
        module: The attention module.
        query: States of shape ``(batch, heads, tokens, head_dim)``; one row if it is packed.
        key: As the query, with as many or fewer heads.
        value: As the key.
        attention_mask: Padding mask of shape ``(batch, tokens)``, or None if nothing is padded.
        dropout: Probability of dropout.
        scaling: Factor of the scores. Defaults to None, ``1 / sqrt(head_dim)``.
        is_causal: Whether tokens attend to earlier ones only. Defaults to None, the property of the module.
        cu_seq_lens_q: Boundaries of packed sequences, from 0 to the number of tokens. Defaults to None: taken from
            positions that restart at zero, or one sequence per row.
        max_length_q: Length of the longest of them. Defaults to None, computed.
        position_ids: Positions of shape ``(batch, tokens)``.
        sliding_window: Not supported unless the sequences are shorter.
        **kwargs: Other arguments of transformers, without effect.

    Returns:
        tuple: States of shape ``(batch, tokens, heads, head_dim)``, and None for the attention weights.

    Raises:
        ValueError: If a sequence is longer than ``sliding_window``, or keys come from a cache.
    """
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"attention implementation {TORCH_FLASH!r} takes no key-value cache, which generation needs: load the model "
            "with attn_implementation 'sdpa'"
        )
    batch, tokens = query.shape[0], query.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    packed = _packed_rows(query, attention_mask, position_ids, cu_seq_lens_q, max_length_q)
    if sliding_window is not None and packed.longest > sliding_window:
        raise ValueError(
            f"attention implementation {TORCH_FLASH!r} has no sliding window, and a sequence is longer than the model's "
            f"{sliding_window} tokens: load the model with attn_implementation 'sdpa'"
        )
    rows = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    if packed.kept is not None:
        rows = [states[packed.kept] for states in rows]
    attend = _flash if _runs_flash(query) else _by_length
    found = attend(rows, packed, causal, scaling, dropout)
    if packed.kept is not None:
        found = found.new_zeros(batch * tokens, *found.shape[1:]).index_put((packed.kept,), found)
    return found.view(batch, tokens, *found.shape[1:]), None


@dataclass(frozen=True)
class _Packed:
    """Sequences in one row: boundaries from 0 to the number of tokens, and the indices of tokens that are not padding."""

    bounds: Tensor
    longest: int
    kept: Tensor | None = None


def _packed_rows(
    query: Tensor, mask: Tensor | None, positions: Tensor | None, bounds: Tensor | None, longest: int | None
) -> _Packed:
    batch, tokens = query.shape[0], query.shape[2]
    source = mask if mask is not None else positions if bounds is None and batch == 1 else None
    if source is None:
        if bounds is None:
            bounds = torch.arange(0, (batch + 1) * tokens, tokens, device=query.device)
            longest = tokens
        return _Packed(bounds, longest if longest is not None else int(bounds.diff().max()))
    # All layers of a forward pass get the same tensor; on a device each new reading of it would wait for the device.
    found: _Packed | None = getattr(source, "_packed_rows", None)
    if found is None:
        if mask is not None:
            bounds, kept = F.pad(mask.sum(1).cumsum(0), (1, 0)), mask.flatten().nonzero().flatten()
        else:
            bounds, kept = F.pad((source[0] == source.min()).nonzero().flatten(), (0, 1), value=tokens), None
        found = _Packed(bounds, int(bounds.diff().max()), kept)
        source._packed_rows = found  # type: ignore[attr-defined]
    return found


def _runs_flash(states: Tensor) -> bool:
    half = states.dtype in (torch.float16, torch.bfloat16)
    return states.is_cuda and half and states.shape[-1] % 8 == 0 and states.shape[-1] <= 256


def _flash(states: list[Tensor], packed: _Packed, causal: bool, scaling: float | None, dropout: float) -> Tensor:
    bounds = packed.bounds.to(states[0].device, torch.int32)
    # The public `torch.nn.attention.varlen` has other arguments in each of the versions that may be installed.
    found: Tensor = torch.ops.aten._flash_attention_forward(
        *states, bounds, bounds, packed.longest, packed.longest, dropout, causal, False, scale=scaling
    )[0]
    return found


def _by_length(states: list[Tensor], packed: _Packed, causal: bool, scaling: float | None, dropout: float) -> Tensor:
    def attend(count: int, length: int, parts: list[Tensor]) -> Tensor:
        query, key, value = (part.view(count, length, *part.shape[1:]).transpose(1, 2) for part in parts)
        found = F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=causal,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=len(key[0]) != len(query[0]),
        )
        return found.transpose(1, 2).flatten(0, 1)

    groups, back = _groups_by_length(packed.bounds)
    if back is None:
        return attend(*groups[0][:2], states)
    pieces = [attend(count, length, [part[rows] for part in states]) for count, length, rows in groups]
    return torch.cat(pieces)[back]


def _groups_by_length(bounds: Tensor) -> tuple[list[tuple[int, int, Tensor]], Tensor | None]:
    """Number, length and tokens of the sequences of each length, and the order that undoes the grouping.

    There is nothing to undo (None) where all have one length. All layers of a forward pass get the same boundaries, which
    keep the result.
    """
    found: tuple[list[tuple[int, int, Tensor]], Tensor | None] | None = getattr(bounds, "_groups_by_length", None)
    if found is None:
        lengths = bounds.diff()
        groups = []
        for length in lengths.unique().tolist():
            starts = bounds[:-1][lengths == length]
            rows = (starts[:, None] + torch.arange(length, device=starts.device)).flatten()
            groups.append((len(starts), length, rows))
        back = torch.cat([rows for _, _, rows in groups]).argsort() if len(groups) > 1 else None
        found = groups, back
        bounds._groups_by_length = found  # type: ignore[attr-defined]
    return found


AttentionInterface.register(TORCH_FLASH, varlen_attention)
AttentionMaskInterface.register(TORCH_FLASH, flash_attention_mask)
