"""Packed batches (padding-free): all sequences of a batch in one row, for flash attention."""

from __future__ import annotations

import copy
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers.utils.generic import is_flash_attention_requested

from unime_st.encoding.model_inputs import Features
from unime_st.encoding.rope_positions import RopePositions


def has_packed_attention(model: SentenceTransformer) -> bool:
    """Whether the language model uses flash attention, which needs neither padding nor a mask.

    Example:
        >>> from unime_st import UniME
        >>> from unime_st.encoding.packed import has_packed_attention
        >>> has_packed_attention(UniME("unime-tiny"))  # sdpa
        False
    """
    first = model[0]
    config = getattr(getattr(first, "model", None), "config", None)
    return (
        isinstance(first, Transformer)
        and isinstance(model[1], Pooling)
        and config is not None
        and is_flash_attention_requested(config.get_text_config())
    )


def without_padding(model: SentenceTransformer) -> SentenceTransformer:
    """Model with the same weights, whose language model receives a batch as one packed row.

    Sequence boundaries are marked by position ids that restart at zero, the convention of transformers: flash attention
    then processes the sequences separately, and sdpa (used in tests) masks them from one another.

    Example:
        >>> from unime_st import UniME
        >>> from unime_st.encoding.packed import without_padding
        >>> without_padding(UniME("unime-tiny")).encode(["a red circle", "a star"]).shape
        (2, 128)
    """
    twin = copy.copy(model)
    twin.__dict__["_modules"] = modules = dict(model._modules)
    modules[next(iter(modules))] = first = _PackedRows.__new__(_PackedRows)
    first.__dict__.update(model[0].__dict__)
    return twin


class _PackedRows(Transformer):
    def forward(self, features: Features, **kwargs: object) -> Features:
        mask = features["attention_mask"].bool()
        lengths = mask.sum(dim=1)
        packed = {
            name: value[mask][None] if torch.is_tensor(value) and value.shape == mask.shape else value
            for name, value in features.items()
            if name != "attention_mask"
        }
        packed["position_ids"] = self._positions(features)[..., mask].unsqueeze(-2)
        found = super().forward(packed, **kwargs)
        # Added after the forward pass, because the vision tower would take them for its own sequence lengths.
        found["cu_seq_lens_q"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return found

    def _positions(self, features: Features) -> torch.Tensor:
        """Position ids of shape (batch, length), or (4, batch, length) for multimodal rotary embeddings."""
        counted = (features["attention_mask"].long().cumsum(dim=1) - 1).clamp(min=0)
        backbone: Any = self.model
        if not hasattr(backbone, "get_rope_index"):
            return counted
        # Those of images and videos are there if a thread has computed them (RopePositions).
        rotary = features.get("position_ids")
        if rotary is None:
            rotary = RopePositions(self).add(features).get("position_ids", counted.expand(3, -1, -1))
        return torch.cat([counted[None], rotary])
