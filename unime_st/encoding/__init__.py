"""Items in, vectors out: the one engine behind :meth:`unime_st.UniME.encode`, mteb tasks, mining and the demo."""

from __future__ import annotations

from unime_st.encoding.encode import encode_items, encode_stream, encode_to_shards
from unime_st.encoding.model_identity import weights_fingerprint
from unime_st.encoding.results import Results, VectorShards
from unime_st.encoding.token_cost import CostModel, most_pixels, pack, within_pixels

__all__ = [
    "CostModel",
    "Results",
    "VectorShards",
    "encode_items",
    "encode_stream",
    "encode_to_shards",
    "most_pixels",
    "pack",
    "weights_fingerprint",
    "within_pixels",
]
