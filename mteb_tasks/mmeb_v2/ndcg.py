"""nDCG with linear gain, correct and as the released evaluation code of MMEB-V2 computes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

Id = TypeVar("Id", int, str)


def ndcg(ranking: Sequence[Id], grades: Mapping[Id, int], k: int = 5) -> float:
    """Normalized discounted cumulative gain; equal to trec_eval's ``ndcg_cut``.

    Args:
        ranking: Document ids, best first.
        grades: Grade of each relevant document, above 0.
        k: Ranks that count. Defaults to 5.

    Returns:
        The score, 0 to 1.

    Example:
        >>> ndcg([2, 1], {1: 1, 2: 3}), ndcg([3, 1], {1: 1})
        (1.0, 0.6309297535714575)
    """
    ideal = _dcg(sorted(grades.values(), reverse=True)[:k])
    return _dcg([grades.get(document, 0) for document in ranking[:k]]) / ideal if ideal else 0.0


def official_ndcg(ranking: Sequence[int], grades: Mapping[int, int], k: int = 5) -> float:
    """nDCG as the released code computes it, which pairs documents with the grades of others.

    The code turns the list of relevant documents into a set and back before it pairs it with the list of grades. With
    integer ids the order of that set is the same in every run of CPython; with strings it is not.

    Args:
        ranking: Document ids, best first.
        grades: Grade of each relevant document, in the order of the judgements.
        k: Ranks that count. Defaults to 5.

    Returns:
        The score; that of `ndcg` where all grades are equal.

    Example:
        >>> official_ndcg([12, 23, 9, 14], {12: 3, 23: 2, 9: 2, 14: 1})
        0.8769874819455437
    """
    documents = list(grades)  # a set made from a dict has another order than one made from a list
    return ndcg(ranking, dict(zip(list(set(documents)), grades.values())), k)


def _dcg(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains))
