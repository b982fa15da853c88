"""Synthetic scenes: drawn images with known content, to train and evaluate ``unime-tiny``."""

from __future__ import annotations

from unime_st.data.scenes.contrast import SCENE_TASKS
from unime_st.data.scenes.example_images import write_example_images
from unime_st.data.scenes.scene_pairs import (
    FOIL_CATEGORIES,
    Foil,
    RetrievalData,
    foils,
    retrieval_data,
    training_records,
)
from unime_st.data.scenes.twins import TWIN_TASKS, TwinTruth, twin_records

__all__ = [
    "FOIL_CATEGORIES",
    "SCENE_TASKS",
    "TWIN_TASKS",
    "Foil",
    "RetrievalData",
    "TwinTruth",
    "foils",
    "retrieval_data",
    "training_records",
    "twin_records",
    "write_example_images",
]
