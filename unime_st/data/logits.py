"""Log-odds of judge scores: conversion between scores in [0, 1] and float32 logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

CERTAIN_LOGIT = 40.0
"""Log-odds of a score of exactly 1 (negated: of 0). The true value is infinity, which would turn losses into NaN. The
sigmoid of 40 is 1.0 in double precision, so the conversion is lossless."""


def to_logits(scores: npt.ArrayLike, *, divisor: float = 1.0) -> np.ndarray:
    """Convert scores to log-odds Yes - No.

    Args:
        scores: Scores in [0, 1].
        divisor: Divisor of the log-odds before the sigmoid. The released UniME-V2 files need 1.05, the repetition
            penalty in the judge's generation config. Defaults to 1.

    Returns:
        np.ndarray: float32 log-odds, clipped to +-:data:`CERTAIN_LOGIT`.

    Example:
        >>> from unime_st.data.logits import to_logits
        >>> to_logits([0.5, 1.0])
        array([ 0., 40.], dtype=float32)
    """
    values = np.asarray(scores, dtype=np.float64)
    with np.errstate(divide="ignore"):
        logits = (np.log(values) - np.log1p(-values)) * divisor
    return np.clip(logits, -CERTAIN_LOGIT, CERTAIN_LOGIT).astype(np.float32)


def to_scores(logits: npt.ArrayLike, *, divisor: float = 1.0) -> np.ndarray:
    """Convert log-odds Yes - No to scores in [0, 1].

    Args:
        logits: Log-odds.
        divisor: As in :func:`to_logits`.

    Returns:
        np.ndarray: float64 scores.

    Example:
        >>> from unime_st.data.logits import to_scores
        >>> to_scores([0.0, 40.0, -40.0]).round(3)
        array([0.5, 1. , 0. ])
    """
    values = np.asarray(logits, dtype=np.float64) / divisor
    small = np.exp(-np.abs(values))  # never overflows
    return np.where(values >= 0, 1.0, small) / (1.0 + small)


def check_scores(scores: object, count: int, indices: Sequence[int] | None = None) -> list[float]:
    """Validate a list of ``count`` scores that was read from a file, and return those at ``indices``, or all.

    Raises:
        ValueError: If the value is not such a list, or one of these scores is not a number in [0, 1].
    """
    if not isinstance(scores, (list, tuple)) or len(scores) != count:
        raise ValueError(f"expected {count} scores, found {scores!r:.80}")
    chosen = list(scores) if indices is None else [scores[index] for index in indices]
    for score in chosen:
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            raise ValueError(f"score {score!r:.80} is not a number")
        if not 0.0 <= score <= 1.0:
            raise ValueError(f"score {score!r:.80} is outside [0, 1]")
    return [float(score) for score in chosen]
