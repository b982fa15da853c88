"""MLLM-as-a-judge: scores of every (query, candidate) pair, and the choice of negatives by them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from unime_st.backbones.video_frames import raise_without_video
from unime_st.data.manifest import is_complete
from unime_st.judging import CascadeJudge, HttpJudge, Judge, LocalJudge, calibration
from unime_st.judging.estimate import estimate_judging
from unime_st.judging.judge_pools import judge_part
from unime_st.judging.score_store import Scores
from unime_st.judging.select_rows import select_rows
from unime_st.options import OptionError, check_options, option, require_options
from unime_st.retrieval.mining import Pools
from unime_st.scoring.prompts import template_for
from unime_st.stages.ray_engine import EngineArguments, cluster_of

logger = logging.getLogger(__name__)


@dataclass
class JudgeArguments(EngineArguments):
    """Options of :func:`run_judge`."""

    data: str = option(
        "",
        "Folder of candidate pools.",
        required=True,
        path="stage",
        made_by="unime mine --data RECORDS --output FOLDER",
    )
    model: str = option("unime-tiny", "Generative vision-language model that judges: alias, folder or hub name.")
    template: str = option(
        "auto", "Prompt template: official, tiny or a file; auto: tiny for unime-tiny, official for others."
    )
    pair_order: Literal["query_first", "candidate_first", "both"] = option(
        "query_first", "Order of the two items in the prompt; both: mean log-odds. --calibrate says which is best."
    )
    scores: str = option("", "Folder for the scores.", required=True, unless=("dry_run", "calibrate"))
    output: str = option("", "Folder for the judged training rows.", required=True, unless=("dry_run", "calibrate"))
    overwrite: bool = option(False, "Overwrite the folders of scores and rows.")
    batch_size: int = option(32, "Batch size.", unit="pairs", at_least=1)
    cache_mb: int = option(256, "Memory for images that were seen before.", unit="MiB", at_least=0)
    dtype: str = option("auto", "Precision of the judge.", choices=("auto", "float32", "bfloat16", "float16"))
    max_text_tokens: int = option(
        0, "Truncation of texts; 0: pairs that are too long are rejected.", unit="tokens", at_least=0
    )
    url: str = option("", "OpenAI-compatible server (.../v1) that is asked for `model` instead of this process.")
    concurrency: int = option(32, "Simultaneous requests to the server.", unit="requests", at_least=1, needs="url")
    strong_model: str = option("", "Second judge, for pairs that the first one is unsure about.")
    strong_band: float = option(
        2.0, "Pairs with abs(log-odds) below this are judged again by strong_model.", at_least=0, needs="strong_model"
    )
    shard: str = option("", "Part of the shards, i/n: every n-th from the i-th on (0/4 ... 3/4).")
    dry_run: bool = option(False, "Print the cost and stop.")
    calibrate: int = option(0, "Queries for a calibration of the judges; nothing is judged then.", at_least=0)
    shard_size: int = option(256, "Shard size; a killed run loses one shard at most.", unit="rows", at_least=1)
    margin: float = option(
        0.01, "Margin: treat candidates scoring above positive - margin as false negatives.", at_least=0
    )
    stride: int = option(5, "Stride of the cyclic sampling.", at_least=1)
    num_negatives: int = option(10, "Negatives of a row.", unit="negatives", at_least=1)
    score_divisor: float = option(1.0, "Score = sigmoid(log-odds / this); the released files have 1.05.", above=0)
    min_positive_score: float = option(
        0.0, "Floor of the positive's score; 1 trusts the pairs and not the judge.", at_least=0, at_most=1
    )
    seed: int = option(0, "Seed of the draw where no candidate survives.", at_least=0)

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)
        part_of(self.shard)
        if self.engine == "ray" and (self.shard or self.overwrite):
            raise OptionError("engine ray deals out all shards of a folder of its own: leave out shard and overwrite.")
        if self.url and self.strong_model:
            raise OptionError("strong_model needs both judges in this process: leave out url.")
        for name in ("template", "max_text_tokens", "dtype") if self.url else ():
            if getattr(self, name) != getattr(JudgeArguments, name):
                raise OptionError(
                    f"{name} {getattr(self, name)} has no effect on the server at url, which is asked the official "
                    f"question in its own chat template, precision and limit of length: leave out {name}."
                )


def run_judge(args: JudgeArguments) -> Path:
    """Score every (query, candidate) pair and choose the negatives of every row.

    Args:
        args: Options.

    Returns:
        Folder of the judged training rows; not there yet after ``dry_run`` or ``calibrate``, or while the shards of
        other processes are missing.
    """
    require_options(args)
    output = Path(args.output)
    pools = Pools(args.data)
    judges = _judges(args)
    if args.calibrate:
        logger.info("\n%s", calibration.report(calibration.calibrate(judges, pools, args.calibrate)))
        return output
    _check_modalities(pools, judges)
    judge = _one_judge(args, judges)
    finished = bool(args.scores) and is_complete(args.scores) and not args.overwrite
    if args.dry_run or not finished:
        logger.info("%s: %s", judge.name, estimate_judging(pools, judge, sample=16 if args.dry_run else 4))
    if args.dry_run:
        return output
    scores = _scores(args, pools, judge)
    if scores is None:
        return output
    rows = select_rows(
        scores,
        output,
        margin=args.margin,
        stride=args.stride,
        num_negatives=args.num_negatives,
        score_divisor=args.score_divisor,
        min_positive_score=args.min_positive_score,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    return rows.folder


def _check_modalities(pools: Pools, judges: list[Judge]) -> None:
    """Refuse a judge in this process that cannot see the images or videos of the pairs; a server says so itself."""
    for judge in judges:
        if not isinstance(judge, LocalJudge):
            continue
        processor = judge.scorer.transformer.processor
        if pools.items.has("image") and getattr(processor, "image_processor", None) is None:
            raise ValueError(
                f"{pools.folder} has images, and the judge {judge.name} takes texts only: use a vision-language model"
            )
        if pools.items.has("video"):
            raise_without_video(processor, judge.scorer.whole_prompts.template)


def _scores(args: JudgeArguments, pools: Pools, judge: Judge) -> Scores | None:
    """The scores; None while the shards of other processes are missing."""
    cluster = cluster_of(args)
    if cluster:
        make_judge = partial(_one_judge, args)
        return cluster.judge(pools.folder, judge, make_judge, args.scores, shard_size=args.shard_size)
    part = part_of(args.shard)
    return judge_part(pools, judge, args.scores, part, shard_size=args.shard_size, overwrite=args.overwrite)


def _one_judge(args: JudgeArguments, judges: list[Judge] | None = None) -> Judge:
    """The judge, or the cascade of both."""
    judges = judges or _judges(args)
    band = (-args.strong_band, args.strong_band)
    return judges[0] if len(judges) == 1 else CascadeJudge(*judges, band=band)


def _judges(args: JudgeArguments) -> list[Judge]:
    """The judge, and the strong one behind it if there is one."""
    if args.url:
        return [HttpJudge(args.url, args.model, concurrency=args.concurrency, pair_order=args.pair_order)]
    return [
        LocalJudge(
            name,
            template=template_for(args.template, name),
            batch_size=args.batch_size,
            cache_bytes=args.cache_mb * 2**20,
            max_text_tokens=args.max_text_tokens or None,
            pair_order=args.pair_order,
            model_kwargs={} if args.dtype == "auto" else {"dtype": args.dtype},
        )
        for name in (args.model, args.strong_model)
        if name
    ]


def part_of(shard: str) -> tuple[int, int]:
    """Part (i, n) that the option ``shard`` stands for: ``i/n`` with 0 <= i < n, or nothing for all.

    Example:
        >>> part_of("1/4"), part_of("")
        ((1, 4), (0, 1))
    """
    if not shard:
        return 0, 1
    index, _, count = shard.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise OptionError(f"shard must be i/n with 0 <= i < n, such as 0/4, but is {shard!r}.")
    return int(index), int(count)
