"""Procedurally drawn scenes: real pictures with known meaning, for the embedded default and its evaluation."""

from __future__ import annotations

from unime_st.data.scenes.tasks import (
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
