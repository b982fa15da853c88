"""The stages between the trainings: mine candidates, judge them, choose negatives."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from unime_st.data.records import RecordSet
from unime_st.judging import LocalJudge
from unime_st.judging.stage import judge_pools, select_rows
from unime_st.model import UniME
from unime_st.retrieval.mining import mine
from unime_st.training.arguments import JudgeArguments, MineArguments


def _named(value: str, option: str) -> str:
    if not value:
        raise ValueError(f"{option} is missing: name a folder (--{option} FOLDER).")
    return value


def ceiling(value: str) -> Literal["positive"] | float | None:
    """Read the option ``max_similarity``: ``positive``, ``none`` or a number.

    Example:
        >>> ceiling("none"), ceiling("0.9")
        (None, 0.9)
    """
    if value == "positive":
        return "positive"
    if value.lower() == "none":
        return None
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"max_similarity must be positive, none or a number, but is {value!r}.") from None


def run_mine(arguments: MineArguments) -> Path:
    """Embed the items of the records once and write the hard candidates of every pair.

    Args:
        arguments: Options.

    Returns:
        Folder of the candidate pools.
    """
    records = RecordSet.load(_named(arguments.data, "data"))
    pools = mine(
        records,
        UniME(arguments.model),
        _named(arguments.output, "output"),
        num_candidates=arguments.num_candidates,
        pool=cast(Any, arguments.pool),
        max_similarity=ceiling(arguments.max_similarity),
        batch_size=arguments.batch_size,
        overwrite=arguments.overwrite,
    )
    return pools.folder


def run_judge(arguments: JudgeArguments) -> Path:
    """Score every (query, candidate) pair and choose the negatives of every row.

    Args:
        arguments: Options.

    Returns:
        Folder of the judged training rows.
    """
    judge = LocalJudge(arguments.model, template=arguments.template, batch_size=arguments.batch_size)
    scores = judge_pools(
        _named(arguments.data, "data"),
        judge,
        _named(arguments.scores, "scores"),
        shard_size=arguments.shard_size,
        overwrite=arguments.overwrite,
    )
    rows = select_rows(
        scores,
        _named(arguments.output, "output"),
        margin=arguments.margin,
        stride=arguments.stride,
        num_negatives=arguments.num_negatives,
        score_divisor=arguments.score_divisor,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    return rows.folder
