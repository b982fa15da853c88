"""A tiny reranker."""

from __future__ import annotations

import pytest
import tiny_reranker as tiny

from unime_st import UniMEReranker


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bare Qwen2-VL checkpoint."""
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny-reranker"))


@pytest.fixture(scope="session")
def reranker(folder: str) -> UniMEReranker:
    """The checkpoint with the official prompts."""
    return UniMEReranker(folder, device="cpu")
