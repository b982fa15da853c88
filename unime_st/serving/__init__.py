"""HTTP server on Ray Serve: embeddings, reranking and search in the shapes of OpenAI, vLLM, Jina and Cohere."""

from __future__ import annotations

from unime_st.serving.settings import ServeSettings

__all__ = ["ServeSettings"]
