"""Cascade of two judges: a cheap one for every pair, a strong one for the pairs the cheap one is unsure about."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unime_st.files import digest
from unime_st.scoring.groups import Group, Judge, PairError, record_error


class CascadeJudge:
    """Judges every pair with a cheap judge, and again with a strong one where the cheap one is unsure.

    Args:
        cheap: Judge of all pairs.
        strong: Judge of the pairs in the band; its scores replace the cheap ones.
        band: Lower and upper bound of the cheap judge's log-odds between which a pair is judged again. Defaults to
            (-2, 2), P(Yes) from 0.12 to 0.88.

    Attributes:
        asked, passed_on: Number of pairs judged by the cheap judge and by the strong one.

    Raises:
        ValueError: If the band is empty.

    Example:
        >>> from unime_st.judging import CascadeJudge, Group, LocalJudge
        >>> judge = LocalJudge("unime-tiny", template="tiny")
        >>> cascade = CascadeJudge(judge, judge, band=(-1.0, 1.0))
        >>> len(cascade.score([Group("a red square", ["a red square", "a blue circle"])])[0])
        2
    """

    def __init__(self, cheap: Judge, strong: Judge, *, band: tuple[float, float] = (-2.0, 2.0)) -> None:
        if not band[0] < band[1]:
            raise ValueError(f"band must be (low, high) with low < high, got {band}")
        self.cheap, self.strong, self.band = cheap, strong, band
        self.name = f"{cheap.name}, then {strong.name} from {band[0]:g} to {band[1]:g}"
        self.revision = f"{cheap.revision}+{strong.revision}"
        self.prompt_hash = digest(f"{cheap.prompt_hash} {strong.prompt_hash} {band}", length=16)
        self.asked = self.passed_on = 0

    @property
    def answer_share(self) -> float | None:
        """The smaller ``answer_share`` of both judges, see :class:`~unime_st.judging.LocalJudge`."""
        shares = [getattr(judge, "answer_share", None) for judge in (self.cheap, self.strong)]
        return min((share for share in shares if share is not None), default=None)

    def score(self, groups: Sequence[Group], *, errors: list[PairError] | None = None) -> list[np.ndarray]:
        """Score every candidate of every group, see :meth:`~unime_st.judging.Judge.score`."""
        scores = self.cheap.score(groups, errors=errors)
        # NaN, a pair that could not be judged, is in no band.
        inside = [np.flatnonzero((found >= self.band[0]) & (found <= self.band[1])) for found in scores]
        rows = [row for row, indices in enumerate(inside) if len(indices)]
        again = [Group(groups[row].query, [groups[row].candidates[index] for index in inside[row]]) for row in rows]
        late: list[PairError] = []  # with the indices of `again`, not the caller's
        for row, found in zip(rows, self.strong.score(again, errors=late), strict=True):
            scores[row][inside[row]] = found
        for error in late:
            row = rows[error.group]
            record_error(errors, row, int(inside[row][error.candidate]), ValueError(error.reason))
        self.asked += sum(map(len, scores))
        self.passed_on += sum(map(len, inside))
        return scores
