"""The stages between the trainings: mine candidates, judge them, choose negatives."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal, cast

from tqdm.auto import tqdm

from unime_st.data.manifest import begin_stage, finish_stage
from unime_st.data.records import PairRecord, RecordSet, RecordWriter
from unime_st.judging import LocalJudge
from unime_st.judging.stage import judge_pools, select_rows
from unime_st.model import UniME
from unime_st.retrieval.mining import Pools, mine
from unime_st.training.arguments import JudgeArguments, MineArguments


def _named(value: str, option: str) -> str:
    if not value:
        raise ValueError(f"{option} is missing: name a folder (--{option} FOLDER).")
    return value


def ceiling(value: str) -> Literal["positive"] | float | None:
    """Read the option ``max_similarity``: ``positive``, ``none`` or a margin above the positive's similarity.

    Example:
        >>> ceiling("none"), ceiling("0.1")
        (None, 0.1)
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


def unjudged_rows(pools: str | Path, output: str | Path, *, num_negatives: int = 4, seed: int = 0) -> RecordSet:
    """Pairs with negatives that nobody judged: half mined, half random. From them a judge learns a new domain.

    Some of the mined ones are false negatives; a judge that is trained on them anyway still ranks what it is asked
    about, which is all that the choice of negatives needs.

    Args:
        pools: Folder of mined pools.
        output: Folder to write.
        num_negatives: Negatives per pair.
        seed: Seed of the draw.

    Returns:
        The records.
    """
    options = {"num_negatives": num_negatives, "seed": seed}
    if not begin_stage(output, "unjudged", inputs=[pools], options=options):
        return RecordSet.load(output)
    found = Pools(pools)
    rng = random.Random(seed)
    pairs = list(found.row_shards.rows())
    by_dataset: dict[str, list[str]] = {}
    for pair in pairs:
        by_dataset.setdefault(pair["dataset"], []).append(pair["positive"])
    with RecordWriter(output) as writer:
        for pair in tqdm(pairs, desc="drawing negatives", unit="row", leave=False):
            mined = pair["candidates"]
            chosen = rng.sample(mined, min(len(mined), num_negatives // 2))
            same = by_dataset[pair["dataset"]]
            drawn = rng.sample(same, min(len(same), 2 * num_negatives))
            others = [item_id for item_id in drawn if item_id != pair["positive"]]
            chosen += others[: num_negatives - len(chosen)]
            query, positive, *negatives = map(found.item, (pair["query"], pair["positive"], *chosen))
            writer.add(PairRecord(query, positive, pair["dataset"], tuple(negatives)))
    finish_stage(output, writer.counts)
    return RecordSet.load(output)


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
