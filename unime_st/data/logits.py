"""Judge scores in [0, 1] and the float32 log-odds they are kept as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

CERTAIN_LOGIT = 40.0
"""Log-odds that stand for a score of exactly 1 (negative: 0). Infinity would be the true value, but it turns losses
into NaN; the sigmoid of 40 is 1.0 in double precision, so nothing is lost."""


def to_logits(scores: Any, *, divisor: float = 1.0) -> np.ndarray:
    """Turn scores into log-odds Yes - No.

    Args:
        scores: Numbers in [0, 1].
        divisor: What the log-odds were divided by before the sigmoid. The released UniME-V2 files need 1.05, the
            repetition penalty of the judge's generation config; defaults to 1.

    Returns:
        np.ndarray: float32, within +-:data:`CERTAIN_LOGIT`.

    Example:
        >>> from unime_st.data.logits import to_logits
        >>> to_logits([0.5, 1.0])
        array([ 0., 40.], dtype=float32)
    """
    values = np.asarray(scores, dtype=np.float64)
    with np.errstate(divide="ignore"):
        logits = (np.log(values) - np.log1p(-values)) * divisor
    return np.clip(logits, -CERTAIN_LOGIT, CERTAIN_LOGIT).astype(np.float32)


def to_scores(logits: Any, *, divisor: float = 1.0) -> np.ndarray:
    """Turn log-odds Yes - No into scores in [0, 1].

    Args:
        logits: Log-odds.
        divisor: As in :func:`to_logits`.

    Returns:
        np.ndarray: float64.

    Example:
        >>> from unime_st.data.logits import to_scores
        >>> to_scores([0.0, 40.0, -40.0]).round(3)
        array([0.5, 1. , 0. ])
    """
    values = np.asarray(logits, dtype=np.float64) / divisor
    small = np.exp(-np.abs(values))  # never overflows
    return np.where(values >= 0, 1.0, small) / (1.0 + small)


def check_scores(scores: Any, count: int, indices: Sequence[int] | None = None) -> list[float]:
    """Accept a list of scores as found in a file, or say what is wrong with it.

    Args:
        scores: The value found.
        count: How many entries there must be.
        indices: Those that matter; the others may hold anything. Defaults to None, all.

    Returns:
        list[float]: The scores that matter.

    Raises:
        ValueError: If it is not a list of ``count`` entries, or one that matters is no number in [0, 1].
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
