"""What judging will cost, before it begins."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from unime_st.judging.judge import Group, Judge, LocalJudge
from unime_st.retrieval.mining import Pools

_BYTES_PER_PAIR = 44  # an id of 32 digits, a similarity, log-odds, and what Parquet adds


@dataclass(frozen=True)
class JudgingCost:
    """What :func:`estimate_cost` expects.

    Args:
        queries: Distinct queries.
        pairs: Pairs to judge, positives included.
        tokens: Tokens through the language model; None where they are not known here.
        tokens_unshared: The same if every pair were computed on its own.
        flops: Floating-point operations of the language model, 2 per weight and token.
        flops_unshared: The same if every pair were computed on its own.
        hours: Expected duration on this device, from timing a sample.
        disk_mb: Expected size of the scores.
        sample: Pairs that were judged to find out.
    """

    queries: int
    pairs: int
    tokens: float | None
    tokens_unshared: float | None
    flops: float | None
    flops_unshared: float | None
    hours: float
    disk_mb: float
    sample: int

    def __str__(self) -> str:
        text = f"{self.pairs:,} pairs of {self.queries:,} queries; "
        if self.tokens and self.tokens_unshared and self.flops and self.flops_unshared:
            saved = self.tokens_unshared / self.tokens
            text += (
                f"{self.tokens:.3g} tokens, {self.flops:.3g} FLOP (pair by pair {self.tokens_unshared:.3g} tokens, "
            )
            text += f"{self.flops_unshared:.3g} FLOP: {saved:.1f} times as much); "
        return f"{text}about {self.hours:.3g} hours here, {self.disk_mb:.3g} MB of scores"

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON."""
        return asdict(self)


def estimate_cost(
    pools: Pools, judge: Judge, *, sample: int = 16, seconds: float = 20.0, seed: int = 0
) -> JudgingCost:
    """Judge a few queries and extrapolate.

    Args:
        pools: Mined pools.
        judge: What will score them.
        sample: Queries to try at most. Defaults to 16.
        seconds: No further query is tried after so long. Defaults to 20.
        seed: Seed of the draw. Defaults to 0.

    Returns:
        JudgingCost: The expected cost of all pools; pairs and queries are exact but for candidates that occur in several
        rows of one query.

    Example:
        >>> from unime_st.judging.estimate import estimate_cost
        >>> print(estimate_cost(Pools("runs/pools"), judge))  # doctest: +SKIP
        22,000 pairs of 2,000 queries; 5e+05 tokens, ...
    """
    table = pools.row_shards.table(["query", "candidates"])
    queries = len(pc.unique(table["query"]))
    pairs = len(table) + int(pc.sum(pc.list_value_length(table["candidates"])).as_py() or 0)
    rows = np.random.default_rng(seed).permutation(len(table))[:sample]
    groups = [Group(pool.query, [pool.positive, *pool.candidates]) for pool in (pools[int(row)] for row in rows)]
    tried = 0
    tokens = unshared = 0
    spent = 0.0
    for start in range(0, len(groups), 4):
        part = groups[start : start + 4]
        began = time.perf_counter()
        judge.score(part, errors=[])
        spent += time.perf_counter() - began
        tried += sum(len(group.candidates) for group in part)
        if isinstance(judge, LocalJudge):
            counted = judge.scorer.tokens([(group.query, group.candidates) for group in part])
            tokens, unshared = tokens + counted[0], unshared + counted[1]
        if spent > seconds:
            break
    scale = pairs / tried if tried else 0.0
    weights = judge.scorer.language_weights if isinstance(judge, LocalJudge) else 0
    known = weights > 0 and tokens > 0
    return JudgingCost(
        queries=queries,
        pairs=pairs,
        tokens=tokens * scale if known else None,
        tokens_unshared=unshared * scale if known else None,
        flops=2.0 * weights * tokens * scale if known else None,
        flops_unshared=2.0 * weights * unshared * scale if known else None,
        hours=spent * scale / 3600,
        disk_mb=pairs * _BYTES_PER_PAIR / 1e6,
        sample=tried,
    )
