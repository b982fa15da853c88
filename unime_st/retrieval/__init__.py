"""Global retrieval: exact top-k over vectors, and the pools mined with it."""

from __future__ import annotations

from unime_st.retrieval.mining import Pool, Pools, mine
from unime_st.retrieval.top_k import paired_similarity, top_k

__all__ = ["Pool", "Pools", "mine", "paired_similarity", "top_k"]
