"""Pairwise and listwise reranking, and search in two stages."""

from __future__ import annotations

from unime_st.reranking.model import UniMEReranker
from unime_st.reranking.search import search

__all__ = ["UniMEReranker", "search"]
