"""Options of a small training, and what it changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

SMALL = {
    "model": "unime-tiny",
    "per_device_train_batch_size": 8,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "lora_dropout": 0.0,
}


def changed(folder: Path) -> float:
    """How far the embedding of a text moved from the embedded default's."""
    texts = ["find an image: a red circle", "a large blue star above a small green ring"]
    before, after = (SentenceTransformer(name, device="cpu").encode(texts) for name in ("unime-tiny", str(folder)))
    assert np.allclose(np.linalg.norm(after, axis=1), 1.0, atol=1e-5)
    return float(np.abs(after - before).max())
