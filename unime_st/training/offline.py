"""The stages between the trainings: mine candidates, judge them, choose negatives."""

from __future__ import annotations

import logging
import random
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from tqdm.auto import tqdm

from unime_st.data.manifest import begin_stage, finish_stage, is_complete
from unime_st.data.records import PairRecord, RecordSet, RecordWriter
from unime_st.judging import CascadeJudge, HttpJudge, Judge, LocalJudge, calibration
from unime_st.judging.estimate import estimate_judging
from unime_st.judging.judge_pools import judge_part
from unime_st.judging.score_store import Scores
from unime_st.judging.select_rows import select_rows
from unime_st.model import UniME
from unime_st.retrieval.mining import Pools, mine
from unime_st.training.arguments import EngineArguments, JudgeArguments, MineArguments

if TYPE_CHECKING:
    from unime_st.stages.ray_engine import Cluster

logger = logging.getLogger(__name__)


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
    cluster = _cluster(arguments)
    pools = mine(
        records,
        UniME(arguments.model),
        _named(arguments.output, "output"),
        num_candidates=arguments.num_candidates,
        pool=cast(Any, arguments.pool),
        max_similarity=ceiling(arguments.max_similarity),
        batch_size=arguments.batch_size,
        embed=cluster.embedder(arguments.model, records, batch_size=arguments.batch_size) if cluster else None,
        vectors=arguments.vectors or None,
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
        Folder of the judged training rows; not there yet after ``dry_run`` or ``calibrate``, or while the shards of
        other processes are missing.
    """
    pools = Pools(_named(arguments.data, "data"))
    cluster = _cluster(arguments)
    if cluster and (arguments.shard or arguments.overwrite):
        raise ValueError("engine ray deals out all shards of a folder of its own: leave out shard and overwrite.")
    judges = _judges(arguments)
    if arguments.calibrate:
        logger.info("\n%s", calibration.report(calibration.calibrate(judges, pools, arguments.calibrate)))
        return Path(arguments.output)
    judge = _one_judge(arguments, judges)
    finished = bool(arguments.scores) and is_complete(arguments.scores) and not arguments.overwrite
    if arguments.dry_run or not finished:
        logger.info("%s: %s", judge.name, estimate_judging(pools, judge, sample=16 if arguments.dry_run else 4))
    if arguments.dry_run:
        return Path(arguments.output)
    output, size = _named(arguments.scores, "scores"), arguments.shard_size
    if cluster:
        make_judge = partial(_one_judge, arguments)
        scores: Scores | None = cluster.judge(pools.folder, judge, make_judge, output, shard_size=size)
    else:
        part, overwrite = part_of(arguments.shard), arguments.overwrite
        scores = judge_part(pools, judge, output, part, shard_size=size, overwrite=overwrite)
    if scores is None:
        return Path(arguments.output)
    rows = select_rows(
        scores,
        _named(arguments.output, "output"),
        margin=arguments.margin,
        stride=arguments.stride,
        num_negatives=arguments.num_negatives,
        score_divisor=arguments.score_divisor,
        min_positive_score=arguments.min_positive_score,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    return rows.folder


def _cluster(arguments: EngineArguments) -> Cluster | None:
    if arguments.engine == "local":
        return None
    from unime_st.stages.ray_engine import Cluster

    return Cluster(arguments.workers, gpus_per_worker=arguments.gpus_per_worker)


def _one_judge(arguments: JudgeArguments, judges: list[Judge] | None = None) -> Judge:
    """The judge, or the cascade of both."""
    judges = judges or _judges(arguments)
    band = (-arguments.strong_band, arguments.strong_band)
    return judges[0] if len(judges) == 1 else CascadeJudge(*judges, band=band)


def _judges(arguments: JudgeArguments) -> list[Judge]:
    """The judge, and the strong one behind it if there is one."""
    if arguments.url:
        if arguments.strong_model:
            raise ValueError("strong_model needs both judges in this process: leave out url.")
        for option in ("template", "max_text_tokens", "dtype"):
            if getattr(arguments, option) != getattr(JudgeArguments, option):
                raise ValueError(
                    f"{option} {getattr(arguments, option)} has no effect on the server at url, which is asked the "
                    f"official question in its own chat template, precision and limit of length: leave out {option}."
                )
        return [HttpJudge(arguments.url, arguments.model, concurrency=arguments.concurrency)]
    return [
        LocalJudge(
            name,
            template=arguments.template,
            batch_size=arguments.batch_size,
            cache_bytes=arguments.cache_mb * 2**20,
            max_text_tokens=arguments.max_text_tokens or None,
            model_kwargs={} if arguments.dtype == "auto" else {"dtype": arguments.dtype},
        )
        for name in (arguments.model, arguments.strong_model)
        if name
    ]


def part_of(shard: str) -> tuple[int, int]:
    """Read the option ``shard``.

    Args:
        shard: ``i/n`` with 0 <= i < n, or nothing for all.

    Returns:
        tuple[int, int]: (i, n).

    Raises:
        ValueError: If it is something else.

    Example:
        >>> part_of("1/4"), part_of("")
        ((1, 4), (0, 1))
    """
    if not shard:
        return 0, 1
    index, _, count = shard.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"shard must be i/n with 0 <= i < n, such as 0/4, but is {shard!r}.")
    return int(index), int(count)
