"""False-negative mask and hardness weights of in-batch negatives."""

from __future__ import annotations

import math

from torch import Tensor

_SAME = 1e-5  # two embeddings whose cosine is this close to 1 are taken for the same item
_LEAST_MARGIN = -2.0  # cosines differ by 2 at most: a margin of -2 masks every candidate


def check_margin(margin: float | None) -> float | None:
    """Return a false-negative margin if it is a finite number above -2, or None; else raise a ValueError.

    Example:
        >>> check_margin(0.1)
        0.1
    """
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not _LEAST_MARGIN < margin < math.inf:
        raise ValueError(
            f"false_negative_margin must be a finite number above -2, or None, but is {margin!r}. With -2 or less every "
            "candidate is masked."
        )
    return margin


def check_strength(strength: float) -> float:
    """Return a hardness strength if it is a finite number of at least 0, else raise a ValueError.

    Example:
        >>> check_strength(9.0)
        9.0
    """
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength < math.inf:
        raise ValueError(f"hardness_strength must be a finite number >= 0, but is {strength!r}.")
    return strength


def same_documents(positives: Tensor, pool: Tensor) -> Tensor:
    """Whether each candidate is the document of each row: boolean ``(rows, pool)``, by their unit vectors.

    Args:
        positives: ``(rows, dim)``, the positive of each row.
        pool: ``(pool, dim)``, the candidates.

    Example:
        >>> import torch
        >>> same_documents(torch.eye(2), torch.eye(2)).tolist()
        [[True, False], [False, True]]
    """
    return positives.detach() @ pool.detach().T > 1 - _SAME


def false_negatives(similarities: Tensor, positives: Tensor, margin: float, same: Tensor) -> Tensor:
    """Mask of false negatives, boolean ``(rows, candidates)``: the row's own document, or ``s > s_positive + margin``.

    Args:
        similarities: ``(rows, candidates)``.
        positives: ``(rows,)``, the similarity of each row's query and positive.
        margin: See the formula.
        same: ``(rows, candidates)`` from :func:`same_documents`.

    References:
        Qwen3 Embedding (https://arxiv.org/abs/2506.05176), equation 1, with a margin of 0.1.

    Example:
        >>> import torch
        >>> similarities = torch.tensor([[0.5, 0.65, 0.55]])
        >>> false_negatives(similarities, torch.tensor([0.5]), 0.1, torch.zeros(1, 3, dtype=torch.bool)).tolist()
        [[False, True, False]]
    """
    return (similarities.detach() > positives.detach()[:, None] + margin) | same
