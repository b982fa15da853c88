"""A judge without a model: it counts common words, or looks answers up."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from unime_st.data import BadImageError, Item
from unime_st.judging import Group, PairError


class WordJudge:
    """Log-odds grow with the words that query and candidate share; images are decoded and not looked at."""

    name, revision, prompt_hash = "words", "1", "none"

    def __init__(self, *, table: Mapping[str, Mapping[str, float]] | None = None, pause: float = 0.0) -> None:
        self.table, self.pause = table, pause
        self.seen: list[tuple[str, str]] = []

    def score(self, groups: Sequence[Group], *, errors: list[PairError] | None = None) -> list[np.ndarray]:
        time.sleep(self.pause)
        answers = []
        for row, group in enumerate(groups):
            logits = np.full(len(group.candidates), np.nan, dtype=np.float32)
            for index, candidate in enumerate(group.candidates):
                self.seen.append((group.query.id, candidate.id))
                try:
                    logits[index] = self._logit(group.query, candidate)
                except BadImageError as error:
                    if errors is None:
                        raise
                    errors.append(PairError(row, index, str(error)))
            answers.append(logits)
        return answers

    def _logit(self, query: Item, candidate: Item) -> float:
        left, right = query.to_input().get("text", ""), candidate.to_input().get("text", "")
        if self.table is not None and left in self.table:
            return self.table[left][right]
        return 1.7 * len(set(left.split()) & set(right.split())) - 2.3
