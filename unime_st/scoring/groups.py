"""Groups of pairs to score: a query with its candidates, the reasons for missing scores, and the judge protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np

from unime_st.data import Item
from unime_st.scoring.prompts import ItemLike, as_item

PairOrder = Literal["query_first", "candidate_first", "both"]
"""Order of the two items in the pairwise prompt: the paper's, the reverse, or the mean log-odds of both."""


def orders_of(pair_order: PairOrder) -> list[PairOrder]:
    """Orders in which a pair is shown.

    Raises:
        ValueError: If the order is unknown.

    Example:
        >>> from unime_st.scoring.groups import orders_of
        >>> orders_of("both")
        ['query_first', 'candidate_first']
    """
    if pair_order not in get_args(PairOrder):
        raise ValueError(f"pair_order must be one of {', '.join(get_args(PairOrder))}, got {pair_order!r}")
    return ["query_first", "candidate_first"] if pair_order == "both" else [pair_order]


@dataclass(frozen=True, init=False)
class Group:
    """A query and the candidates to score for it.

    Args:
        query: An item, or what :func:`~unime_st.judging.as_item` accepts (text, Pillow image, dict).
        candidates: The same, one per candidate.

    Example:
        >>> from unime_st.judging import Group
        >>> len(Group("a red square", ["a red box", "a blue dot"]).candidates)
        2
    """

    query: Item
    candidates: list[Item]

    def __init__(self, query: ItemLike, candidates: Sequence[ItemLike]) -> None:
        object.__setattr__(self, "query", as_item(query))
        object.__setattr__(self, "candidates", [as_item(candidate) for candidate in candidates])


@dataclass(frozen=True)
class PairError:
    """The reason why a pair has no score.

    Args:
        group: Index of the group.
        candidate: Index of the candidate in its group.
        reason: One sentence.
    """

    group: int
    candidate: int
    reason: str


@runtime_checkable
class Judge(Protocol):
    """Protocol of a judge: an object that scores the candidates of queries.

    ``name``, ``revision`` and ``prompt_hash`` identify the source of a score. Scores that differ in one of them must
    not be mixed.
    """

    name: str
    revision: str
    prompt_hash: str

    def score(self, groups: Sequence[Group], *, errors: list[PairError] | None = None) -> list[np.ndarray]:
        """Score every candidate of every group.

        Args:
            groups: Queries with their candidates.
            errors: List that collects the pairs that cannot be scored; their score is NaN. Defaults to None: the first
                such pair raises.

        Returns:
            list[np.ndarray]: Per group a float32 array of log-odds, one per candidate in order.
        """
        ...


def record_error(errors: list[PairError] | None, group: int, candidate: int, error: ValueError) -> None:
    """Record why a pair has no score, or with ``errors`` None raise the reason with the pair's index in front.

    Example:
        >>> errors = []
        >>> record_error(errors, 0, 1, ValueError("the image is corrupt"))
        >>> errors
        [PairError(group=0, candidate=1, reason='the image is corrupt')]
    """
    if errors is None:
        raise type(error)(f"group {group}, candidate {candidate}: {error}") from error
    errors.append(PairError(group, candidate, str(error)))
