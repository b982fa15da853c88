"""Random embedder: the model of mteb's tests of evaluation, which the source distribution of mteb leaves out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sentence_transformers import SentenceTransformer
from torch import nn


class MockSentenceTransformer(SentenceTransformer):
    """A model whose vectors depend on the number of inputs only. mteb's tests import it by this name."""

    def __init__(self) -> None:
        super().__init__(modules=[nn.Identity()], device="cpu")
        self.model_card_data.model_name = "mock/MockSentenceTransformer"
        self.model_card_data.base_model_revision = "1"

    def encode(self, inputs: Sequence[object], **kwargs: object) -> np.ndarray:  # type: ignore[override]
        """Vectors of shape (num_inputs, 10); their seed is the one whose scores mteb's tests expect."""
        return np.random.RandomState(42).randn(len(inputs), 10)
