"""Retrieval: exact top-k search over vectors, and mining of hard-negative candidates."""

from __future__ import annotations

from unime_st.retrieval.mining import Pool, Pools, mine
from unime_st.retrieval.top_k import paired_similarity, top_k

__all__ = ["Pool", "Pools", "mine", "paired_similarity", "top_k"]
