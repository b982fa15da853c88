"""Losses of UniME, UniME-V2 and in-batch InfoNCE for the trainers of sentence-transformers."""

from __future__ import annotations

from unime_st.losses.hard_negative_ranking import HardNegativeRankingLoss
from unime_st.losses.info_nce import InfoNCELoss
from unime_st.losses.reranker import RerankerLoss
from unime_st.losses.similarity_distillation import SimilarityDistillationLoss
from unime_st.losses.soft_label_distillation import SoftLabelDistillationLoss

__all__ = [
    "HardNegativeRankingLoss",
    "InfoNCELoss",
    "RerankerLoss",
    "SimilarityDistillationLoss",
    "SoftLabelDistillationLoss",
]
