"""Items in, vectors out: the one engine behind :meth:`unime_st.UniME.encode`, mteb tasks, mining and the demo."""

from __future__ import annotations

from unime_st.encoding.cost import CostModel, pack
from unime_st.encoding.fingerprint import weights_fingerprint
from unime_st.encoding.items import encode_items, encode_to_shards
from unime_st.encoding.results import VectorShards

__all__ = ["CostModel", "VectorShards", "encode_items", "encode_to_shards", "pack", "weights_fingerprint"]
