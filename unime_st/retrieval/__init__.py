"""Global retrieval: exact top-k over vectors, and the pools mined with it."""

from __future__ import annotations

from unime_st.retrieval.top_k import paired_similarity, top_k

__all__ = ["paired_similarity", "top_k"]
