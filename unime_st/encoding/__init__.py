"""Encoding engine behind :meth:`unime_st.UniME.encode`, the mteb tasks, mining and search."""

from __future__ import annotations

from unime_st.encoding.encode import encode_items, encode_stream, encode_to_shards
from unime_st.encoding.model_identity import model_fingerprint, weights_fingerprint
from unime_st.encoding.token_counts import TokenCounter, pack, pixel_budget, split_by_pixels
from unime_st.encoding.vector_shards import VectorShards, VectorSink

__all__ = [
    "TokenCounter",
    "VectorShards",
    "VectorSink",
    "encode_items",
    "encode_stream",
    "encode_to_shards",
    "model_fingerprint",
    "pack",
    "pixel_budget",
    "split_by_pixels",
    "weights_fingerprint",
]
