"""Losses of UniME and UniME-V2 for the trainers of sentence-transformers."""

from __future__ import annotations

from unime_st.losses.hard_negative_ranking import HardNegativeRankingLoss
from unime_st.losses.reranker import RerankerLoss
from unime_st.losses.similarity_distillation import SimilarityDistillationLoss
from unime_st.losses.soft_label_distillation import SoftLabelDistillationLoss

__all__ = ["HardNegativeRankingLoss", "RerankerLoss", "SimilarityDistillationLoss", "SoftLabelDistillationLoss"]
