"""Fast modules: patch projections and attention with the results of transformers' own, in less time."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from unime_st.backbones.grouped_attention import SDPA_GROUPED
from unime_st.backbones.patch_projection import replace_patch_projections
from unime_st.backbones.varlen_attention import TORCH_FLASH


def use_fast_modules(model: nn.Module, *, everywhere: bool = False) -> None:
    """Let a model use our patch projections, and our attention instead of sdpa; modifies it, saved files do not change.

    Vision towers that pack their images get :func:`~unime_st.backbones.varlen_attention.varlen_attention`, layers whose
    heads share keys and values :func:`~unime_st.backbones.grouped_attention.grouped_attention`. Layers of other
    implementations, such as ``flash_attention_2`` or ``eager``, stay as they are.

    Args:
        model: The model.
        everywhere: The language model gets ``varlen_attention``, too. Defaults to False.

    Example:
        >>> from unime_st import UniME
        >>> model = UniME("unime-tiny").transformers_model  # calls it
        >>> model.visual.config._attn_implementation, model.language_model.config._attn_implementation
        ('torch_flash', 'sdpa_grouped')
    """
    replace_patch_projections(model)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) not in ("sdpa", SDPA_GROUPED):
            continue
        if everywhere or "cu_seqlens" in inspect.signature(type(module).forward).parameters:
            config._attn_implementation = TORCH_FLASH
        elif getattr(module, "num_key_value_groups", 1) > 1:
            config._attn_implementation = SDPA_GROUPED
