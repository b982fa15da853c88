"""Synthetic scenes: drawn images with known content, to train and evaluate ``unime-tiny``."""

from __future__ import annotations

from unime_st.data.scenes.example_images import write_example_images
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
    "write_example_images",
]
