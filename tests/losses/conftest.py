"""Tiny random models of real classes with real processors for texts, images and both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_reranker
from sentence_transformers import SentenceTransformer
from tiny_embedder import write_tiny_embedder


@pytest.fixture(scope="session")
def embedder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the native SentenceTransformer."""
    return write_tiny_embedder(tmp_path_factory.mktemp("embedder"), sides=(28, 56), vision_depth=1)


@pytest.fixture(scope="session")
def reranker_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random reranker."""
    return tiny_reranker.checkpoint(tmp_path_factory.mktemp("tiny-reranker"))


@pytest.fixture(scope="session")
def model(embedder_folder: str) -> SentenceTransformer:
    """One copy of the model, for tests whose loss never runs it."""
    return SentenceTransformer(embedder_folder, device="cpu")


@pytest.fixture
def embedder(embedder_folder: str) -> Callable[..., SentenceTransformer]:
    """Loads fresh copies of the model, in training mode and with the given attention dropout."""

    def load(dropout: float = 0.0) -> SentenceTransformer:
        model = SentenceTransformer(embedder_folder, device="cpu")
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = dropout
        return model.train()

    return load
