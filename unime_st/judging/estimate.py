"""Estimate of the cost of judging: pairs, tokens, FLOPs, time and disk space, from a timed sample."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow.compute as pc

from unime_st.durations import format_duration
from unime_st.judging.local_judge import LocalJudge
from unime_st.retrieval.mining import Pools
from unime_st.scoring.groups import Group, Judge
from unime_st.scoring.prompts import LEAST_ANSWER_SHARE, NO_ANSWER_ADVICE

_BYTES_PER_PAIR = 44  # an id of 32 digits, a similarity, log-odds, and what Parquet adds
_QUERIES_AT_ONCE = 4


@dataclass(frozen=True)
class CostEstimate:
    """Expected cost of judging, see :func:`estimate_judging`.

    Tokens and FLOPs (2 per weight and token) are those of the language model, None if unknown, as with a server;
    ``..._unshared`` is the same with every pair computed by itself. Hours are those of this device, from a timed
    sample.
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
            text += (
                f"{self.tokens:.3g} tokens, {self.flops:.3g} FLOP (without prefix sharing {self.tokens_unshared:.3g} "
                f"tokens, {self.flops_unshared:.3g} FLOP: {self.tokens_unshared / self.tokens:.1f} times as many); "
            )
        return f"{text}about {format_duration(self.hours * 3600)} here, {self.disk_mb:.3g} MB of scores"

    def to_dict(self) -> dict[str, object]:
        """Return the estimate as a dict for JSON."""
        return asdict(self)


def estimate_judging(
    pools: Pools, judge: Judge, *, sample: int = 16, seconds: float = 20.0, seed: int = 0
) -> CostEstimate:
    """Judge a sample of queries and extrapolate to all pools.

    Args:
        pools: Mined pools.
        judge: The judge.
        sample: Maximum number of queries in the sample. Defaults to 16.
        seconds: Time after which no further query is judged. Defaults to 20.
        seed: Seed of the sample. Defaults to 0.

    Returns:
        CostEstimate: The expected cost. Numbers of pairs and queries are exact, except that a candidate which occurs
        in several rows of one query is counted in each.

    Raises:
        ValueError: If the judge does not answer Yes or No, so that its scores would be worthless.
    """
    table = pools.row_shards.table(["query", "candidates"])
    queries = len(pc.unique(table["query"]))
    pairs = len(table) + int(pc.sum(pc.list_value_length(table["candidates"])).as_py() or 0)
    rows = np.random.default_rng(seed).permutation(len(table))[:sample]
    groups = [Group(pool.query, [pool.positive, *pool.candidates]) for pool in (pools[int(row)] for row in rows)]
    judged = tokens = unshared = 0
    spent = 0.0
    for start in range(0, len(groups), _QUERIES_AT_ONCE):
        part = groups[start : start + _QUERIES_AT_ONCE]
        began = time.perf_counter()
        judge.score(part, errors=[])
        spent += time.perf_counter() - began
        judged += sum(len(group.candidates) for group in part)
        if isinstance(judge, LocalJudge):
            counted = judge.count_tokens(part)
            tokens, unshared = tokens + counted[0], unshared + counted[1]
        share = getattr(judge, "answer_share", None)
        if share is not None and share < LEAST_ANSWER_SHARE:
            raise ValueError(f"{judge.name}: {NO_ANSWER_ADVICE}.")
        if spent > seconds:
            break
    scale = pairs / judged if judged else 0.0
    weights = judge.scorer.language_weights if isinstance(judge, LocalJudge) else 0
    known = weights > 0 and tokens > 0
    return CostEstimate(
        queries=queries,
        pairs=pairs,
        tokens=tokens * scale if known else None,
        tokens_unshared=unshared * scale if known else None,
        flops=2.0 * weights * tokens * scale if known else None,
        flops_unshared=2.0 * weights * unshared * scale if known else None,
        hours=spent * scale / 3600,
        disk_mb=pairs * _BYTES_PER_PAIR / 1e6,
        sample=judged,
    )
