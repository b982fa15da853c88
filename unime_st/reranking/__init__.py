"""Reranking: the pairwise and listwise reranker, and two-stage search."""

from __future__ import annotations

from unime_st.reranking.search import search
from unime_st.reranking.unime_reranker import UniMEReranker

__all__ = ["UniMEReranker", "search"]
