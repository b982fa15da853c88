"""Small batches of texts, images and both for the three embedding losses; imported by spawned processes, too."""

from __future__ import annotations

import random
from typing import Any

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor

from unime_st.losses import (
    HardNegativeRankingLoss,
    InfoNCELoss,
    SimilarityDistillationLoss,
    SoftLabelDistillationLoss,
)
from unime_st.losses.base import CachedEmbeddingLoss

WORDS = "red green blue small large round square dot line above below two three striped plain shape".split()


def text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))


def make_image(rng: random.Random) -> Image.Image:
    size = (rng.choice([28, 56]), rng.choice([28, 56]))
    return Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))


def column(kind: str, num_rows: int, seed: int) -> list[Any]:
    """Inputs of one column; "mixed" alternates texts, images and image+text."""
    rng = random.Random(seed)
    makers = {
        "text": [text],
        "image": [make_image],
        "mixed": [text, lambda r: {"image": make_image(r), "text": text(r)}, make_image],
    }[kind]
    return [makers[row % len(makers)](rng) for row in range(num_rows)]


def features(model: SentenceTransformer, kinds: list[str], num_rows: int, rows: slice = slice(None)) -> list[dict]:
    """Preprocessed columns, restricted to some rows of the batch."""
    return [model.preprocess(column(kind, num_rows, seed)[rows]) for seed, kind in enumerate(kinds)]


def labelled_losses(
    model: torch.nn.Module, num_rows: int, **options: Any
) -> dict[str, tuple[CachedEmbeddingLoss, int, Tensor | None]]:
    """Each loss with its number of columns and the labels of the batch."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(num_rows, 12, generator=generator)
    scores = torch.rand(num_rows, 3, generator=generator)
    return {
        "similarity": (SimilarityDistillationLoss(model, 0.1, mask_diagonal=True, **options), 1, teacher),
        "hard negatives": (HardNegativeRankingLoss(model, 0.1, num_negatives=3, **options), 3, None),
        "all filtered": (HardNegativeRankingLoss(model, 0.1, -3.0, **options), 3, None),
        "soft labels": (SoftLabelDistillationLoss(model, 0.1, **options), 4, scores),
        "info nce": (InfoNCELoss(model, 0.1, **options), 2, None),
        "info nce, all": (
            InfoNCELoss(
                model,
                0.1,
                false_negative_margin=0.02,
                directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
                hardness_mode="all_negatives",
                hardness_strength=4.0,
                learnable_temperature=True,
                **options,
            ),
            3,
            None,
        ),
        "soft labels, masked": (
            SoftLabelDistillationLoss(
                model, 0.1, in_batch_weight=0.5, false_negative_margin=0.02, hardness_strength=4.0, **options
            ),
            4,
            scores,
        ),
        "soft labels, in batch": (SoftLabelDistillationLoss(model, 0.1, in_batch_weight=0.5, **options), 4, scores),
    }


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def own_gradients(loss: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients of parameters of the loss itself, such as a learnable temperature."""
    return {name: p.grad.clone() for name, p in loss.named_parameters(recurse=False) if p.grad is not None}


def largest_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest difference of two sets of gradients, relative to the largest gradient (or 1e-3 if all are smaller)."""
    assert found.keys() == wanted.keys()
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted) / max(scale, 1e-3)
