"""A foreign model for mteb: random vectors that depend on content alone."""

from __future__ import annotations

import zlib

import numpy as np

from mteb_tasks.metadata import model_meta


class Noisy:
    """A foreign encoder whose vectors depend only on what mteb shows it."""

    def __init__(self):
        self.mteb_model_meta = model_meta("noisy/hash", "1")

    def encode(self, inputs, *, prompt_type=None, **kwargs):
        return np.concatenate([self._batch(batch) for batch in inputs]).astype(np.float32)

    def _batch(self, batch):
        texts, images = batch.get("text"), batch.get("image")
        rows = len(texts if texts is not None else images)
        seeds = [
            zlib.crc32(
                (texts[row] if texts is not None else "").encode()
                + (images[row].tobytes() if images is not None else b"")
            )
            for row in range(rows)
        ]
        return np.stack([np.random.default_rng(seed).normal(size=16) for seed in seeds])

    def similarity(self, a, b):
        a, b = np.asarray(a), np.asarray(b)
        return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T

    def similarity_pairwise(self, a, b):
        return np.diag(self.similarity(a, b))
