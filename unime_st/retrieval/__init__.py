"""Retrieval: exact top-k, mining of hard negatives, and the search index on faiss."""

from __future__ import annotations

from unime_st.retrieval.index import Hit, Index
from unime_st.retrieval.index_settings import IndexSettings
from unime_st.retrieval.mining import Pool, Pools, mine
from unime_st.retrieval.top_k import paired_similarity, top_k

__all__ = ["Hit", "Index", "IndexSettings", "Pool", "Pools", "mine", "paired_similarity", "top_k"]
