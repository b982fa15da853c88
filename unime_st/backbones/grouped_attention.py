"""Grouped-query attention on a CPU without repeated keys and values.

Registered in transformers as ``"sdpa_grouped"``. Heads of the families share keys and values in groups. With a mask,
stock sdpa copies those of a group once for each of its heads, because on CUDA a mask rules the flash kernel for groups
out. The kernel for the CPU takes groups with a mask, too: the same values bit by bit, without the copies.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SDPA_GROUPED = "sdpa_grouped"
_PLAIN = {"softcap", "position_bias", "cache"}
"""Arguments with which stock sdpa does more than one call of torch."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers; that of stock sdpa without a mask or on other devices than a CPU.

    Args:
        module: The attention module.
        query: States of shape ``(batch, heads, tokens, head_dim)``.
        key: As the query, with fewer heads.
        value: As the key.
        attention_mask: Mask of shape ``(batch, 1, tokens, keys)``, or None.
        dropout: Probability of dropout.
        scaling: Factor of the scores. Defaults to None, ``1 / sqrt(head_dim)``.
        **kwargs: Other arguments of transformers.

    Returns:
        tuple: States of shape ``(batch, tokens, heads, head_dim)``, and None for the attention weights.
    """
    special = any(kwargs.get(name) is not None for name in _PLAIN)
    if attention_mask is None or query.device.type != "cpu" or special:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    found = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register(SDPA_GROUPED, grouped_attention)
AttentionMaskInterface.register(SDPA_GROUPED, sdpa_mask)
