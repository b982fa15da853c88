"""Procedurally drawn scenes: real images with known meaning, for the embedded default and its evaluation."""

from __future__ import annotations

from unime_st.data.scenes.scene_pairs import (
    FOIL_CATEGORIES,
    SCENE_TASKS,
    Foil,
    RetrievalData,
    foils,
    retrieval_data,
    training_records,
)

__all__ = [
    "FOIL_CATEGORIES",
    "SCENE_TASKS",
    "Foil",
    "RetrievalData",
    "foils",
    "retrieval_data",
    "training_records",
]
