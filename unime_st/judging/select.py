"""Hard-negative selection: the negatives of one training row from the judge's scores of a candidate pool."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from unime_st.options import check_count


def select_negatives(
    scores: ArrayLike,
    positive_score: float,
    *,
    margin: float = 0.01,
    stride: int = 5,
    num_negatives: int = 10,
    generator: np.random.Generator | None = None,
    relax_low_positive: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Choose the hard negatives of one query from its judged candidate pool, as in UniME-V2.

    1. *False-negative filter*: a candidate survives if ``score <= positive_score - margin``, compared in float64
       without a tolerance, so a candidate that sits exactly on the threshold survives.
    2. *Cyclic sampling*: walk the survivors in similarity order with the given stride (0, 5, 10, ...), then again from
       the next offset (1, 6, 11, ...), and so on. Every survivor is visited once before any is repeated; a pool with
       fewer survivors than ``num_negatives`` is repeated from the start of the walk.
    3. *None left*: if no candidate survives, random members of the whole pool are taken and each gets the score 1.0,
       i.e. the soft labels treat them as matches, not as negatives. They are drawn without replacement where the pool
       is large enough.

    The paper says "cyclic" without saying where the second pass starts. Restarting at the next offset is our reading:
    the alternative, index ``stride * i mod n``, visits one fifth of the survivors whenever their number is a multiple
    of five, although the paper duplicates only if fewer than ``num_negatives`` candidates are left.

    Args:
        scores: Judge scores P(Yes) in [0, 1] of the pool, shape ``(pool_size,)``, in order of falling similarity.
        positive_score: Judge score P(Yes) in [0, 1] of the query's own positive.
        margin: How far below the positive's score a candidate has to stay. The default is the paper's 0.01.
        stride: Step of the walk over the survivors, in ranks. The default is the paper's 5.
        num_negatives: Number of negatives to return. The default is the paper's 10.
        generator: Source of the random draw when nothing survives. Pass a seeded one to make a run repeatable; the
            default None draws from fresh entropy.
        relax_low_positive: What to do when the positive itself is judged so low that ``positive_score <= margin``:
            the published rule (False, the default) then accepts only candidates below zero, hence falls through to
            rule 3. True keeps the candidates with ``score < positive_score`` instead, which is what the one such
            record in the released training data shows.

    Returns:
        A tuple ``(indices, scores)`` of arrays of length ``num_negatives``: int64 positions in the pool and the
        float64 scores to train with (those of the pool, or 1.0 under rule 3).

    Raises:
        ValueError: If the pool is empty or not one-dimensional, if a score is NaN or outside [0, 1], or if ``margin``,
            ``stride`` or ``num_negatives`` makes no sense.

    Example:
        >>> from unime_st.selection import select_negatives
        >>> indices, scores = select_negatives([0.95, 0.40, 0.91, 0.10], positive_score=0.9, num_negatives=3)
        >>> indices.tolist(), scores.tolist()
        ([1, 3, 1], [0.4, 0.1, 0.4])

    References:
        - UniME-V2 (https://arxiv.org/abs/2510.13515), "MLLM-as-a-Judge for hard negatives mining": the threshold
          alpha = s_pos - beta, the cyclic sampling with step five, and the two rules for short and empty pools.
    """
    try:
        pool = np.asarray(scores, dtype=np.float64)
        positive_score, margin = float(positive_score), margin if isinstance(margin, bool) else float(margin)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scores, positive_score and margin must be numbers ({error})") from error
    _check_arguments(pool, positive_score, margin, stride, num_negatives)

    survivors = np.flatnonzero(surviving(pool, positive_score, margin, relax_low_positive))
    if survivors.size == 0:
        generator = np.random.default_rng() if generator is None else generator
        chosen = generator.choice(pool.size, size=num_negatives, replace=pool.size < num_negatives)
        return chosen.astype(np.int64), np.ones(num_negatives)

    walk = np.concatenate([survivors[offset::stride] for offset in range(min(stride, survivors.size))])
    chosen = np.resize(walk, num_negatives).astype(np.int64)  # np.resize repeats the walk from its start
    return chosen, pool[chosen]


def surviving(pool: np.ndarray, positive_score: float, margin: float, relax_low_positive: bool) -> np.ndarray:
    """Mask of the candidates that the false-negative filter of :func:`select_negatives` keeps."""
    if relax_low_positive and positive_score <= margin:
        return pool < positive_score
    return pool <= positive_score - margin


def _check_arguments(pool: np.ndarray, positive_score: float, margin: float, stride: int, num_negatives: int) -> None:
    if pool.ndim != 1 or pool.size == 0:
        raise ValueError(
            f"scores must be a non-empty list of judge scores, one per candidate, but has shape {pool.shape}. "
            "A query without candidates has nothing to choose from: mine a pool for it or leave it out."
        )
    bad = np.flatnonzero(~((pool >= 0.0) & (pool <= 1.0)))  # the negation also catches NaN
    if bad.size:
        raise ValueError(
            f"scores[{bad[0]}] is {pool[bad[0]]}, but judge scores are probabilities in [0, 1] "
            f"({bad.size} of {pool.size} are not). Turn log-odds into probabilities with a sigmoid first."
        )
    if not 0.0 <= positive_score <= 1.0:
        raise ValueError(f"positive_score is {positive_score}, but judge scores are probabilities in [0, 1].")
    if isinstance(margin, bool) or not np.isfinite(margin):
        raise ValueError(f"margin must be a finite number, but is {margin}.")
    check_count("stride", stride)
    check_count("num_negatives", num_negatives)
