"""The judge as a stage: mined pools in, scores out; then scores in, training rows out."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from unime_st.data.logits import CERTAIN_LOGIT, to_logits, to_scores
from unime_st.data.manifest import begin_stage, finish_stage
from unime_st.data.parquet_shards import ShardWriter, link_items
from unime_st.data.records import ROW_SCHEMA, RecordSet
from unime_st.data.validation import RejectedWriter
from unime_st.files import folder_lock
from unime_st.judging.judge import Group, Judge, PairError
from unime_st.judging.score_store import Scores, ScoreShards
from unime_st.judging.select import select_negatives
from unime_st.retrieval.mining import Pools

logger = logging.getLogger(__name__)

_BINS = 20


def judge_pools(
    pools: Pools | str | Path,
    judge: Judge,
    output: str | Path,
    *,
    shard_size: int = 256,
    overwrite: bool = False,
) -> Scores:
    """Judge every pair of query and candidate once, and every pair of query and positive.

    The work is cut into shards of whole queries. A shard is written when all of it is judged; after a kill, finished
    shards are kept and the one in flight is judged again. Scores of two judges or prompts are never mixed: a folder
    that was begun with one refuses another, and every shard names its judge and prompt.

    For several processes see :func:`judge_part`.

    Args:
        pools: Mined pools, or their folder.
        judge: What scores pairs.
        output: Folder to write.
        shard_size: Rows per shard; the last query of a shard may exceed it. Defaults to 256.
        overwrite: Replace an output made with another judge or other options. Defaults to False.

    Returns:
        Scores: Rows of the same query stand together. Pairs that cannot be judged (a corrupt image) are in
        ``rejected.jsonl``; a row whose positive cannot be judged is there as a whole.

    Raises:
        StageConflictError: If the output was begun with another judge, prompt or input and ``overwrite`` is False.
        ValueError: If the judge returns the wrong number of scores, or one that is not finite without a reason.

    References:
        UniME-V2 (https://arxiv.org/abs/2510.13515), "MLLM-as-a-Judge": the score of a pair, positive included.

    Example:
        ::

            from unime_st.judging import LocalJudge
            from unime_st.judging.stage import judge_pools, select_rows

            scores = judge_pools("runs/own/pools", LocalJudge("unime-tiny", template="tiny"), "runs/own/scores")
            rows = select_rows(scores, "runs/own/rows")
    """
    scores = judge_part(pools, judge, output, (0, 1), shard_size=shard_size, overwrite=overwrite)
    assert scores is not None  # the only part is all there is
    return scores


def judge_part(
    pools: Pools | str | Path,
    judge: Judge,
    output: str | Path,
    part: tuple[int, int],
    *,
    shard_size: int = 256,
    overwrite: bool = False,
) -> Scores | None:
    """Do a part of :func:`judge_pools`, so that several processes share the work.

    All write to one folder; no pair is judged by two of them. Whichever finds all shards done finishes the folder.

    Args:
        pools: Mined pools, or their folder.
        judge: What scores pairs; the same in every process.
        output: Folder to write.
        part: (i, n) does every n-th shard from the i-th on, 0 <= i < n.
        shard_size: Rows per shard; the same in every process. Defaults to 256.
        overwrite: Replace an output made with another judge or other options; only where n is 1. Defaults to False.

    Returns:
        Scores | None: None as long as shards of other parts are missing.

    Raises:
        ValueError, StageConflictError: See :func:`judge_pools`; also if the part makes no sense.

    Example:
        >>> from unime_st.judging.stage import judge_part
        >>> judge_part("runs/pools", judge, "runs/scores", (0, 4))  # doctest: +SKIP
    """
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part must be (i, n) with 0 <= i < n, got {part}")
    if overwrite and part[1] > 1:
        raise ValueError("overwrite would throw away what the other parts have done: remove the folder instead")
    work = JudgeWork(pools, judge, output, shard_size=shard_size, overwrite=overwrite)
    if work.finished:
        return Scores(output)
    mine = range(part[0], len(work.rows), part[1])
    pending = work.pending(mine)
    with work.progress(mine, pending) as progress:
        for number in pending:
            for due in work.pending([number]):  # the same command, started twice, may have written it meanwhile
                progress.update(work.do(due))
    return work.finish()


class JudgeWork:
    """The shards of a folder of scores, to be done one by one, by whatever process.

    Args:
        pools: Mined pools, or their folder.
        judge: What scores pairs.
        output: Folder to write.
        shard_size: Rows per shard. Defaults to 256.
        overwrite: Replace an output made with another judge or other options. Defaults to False.

    Raises:
        StageConflictError: If the output was begun with something else and ``overwrite`` is False.
    """

    def __init__(
        self,
        pools: Pools | str | Path,
        judge: Judge,
        output: str | Path,
        *,
        shard_size: int = 256,
        overwrite: bool = False,
    ) -> None:
        self.pools = pools if isinstance(pools, Pools) else Pools(pools)
        self.judge, self.output = judge, Path(output)
        identity = {"name": judge.name, "revision": judge.revision, "prompt_hash": judge.prompt_hash}
        options = {"judge": identity, "shard_size": shard_size}
        with folder_lock(self.output):  # processes that a scheduler starts at once
            self.finished = not begin_stage(
                self.output, "judge", inputs=[self.pools.folder], options=options, overwrite=overwrite
            )
            if not self.finished:
                link_items(self.pools.folder, self.output)
        self.rows = _cut(self.pools.row_shards.column("query").to_pylist(), shard_size)
        self._shards = ScoreShards(self.output, identity, len(self.rows))

    def pending(self, mine: Sequence[int]) -> list[int]:
        """Which of some shards are still to do."""
        return self._shards.missing(mine)

    def progress(self, mine: Sequence[int], pending: Sequence[int]) -> tqdm[Any]:
        """Say what there is to do; gives a bar over the rows of some shards."""
        logger.info(
            "judge: %d pairs of %d distinct items with %s; %d of %d shards to do here",
            len(self.pools) + self.pools.manifest["candidates"],
            len(self.pools.items),
            self.judge.name,
            len(pending),
            len(mine),
        )
        total, left = (sum(len(self.rows[number]) for number in numbers) for numbers in (mine, pending))
        return tqdm(total=total, initial=total - left, desc="judging", unit="row")

    def do(self, number: int) -> int:
        """Judge and write a shard; gives its number of rows."""
        rows = [self.pools.row_shards.row(row) for row in self.rows[number]]
        _judge_shard(self.pools, self.judge, self._shards, number, rows)
        return len(rows)

    def finish(self) -> Scores | None:
        """The scores if all shards are there."""
        facts = {"image_root": self.pools.manifest.get("image_root"), "items": len(self.pools.items)}
        return Scores(self.output) if self._shards.finish(facts) else None


def _cut(queries: Sequence[str], shard_size: int) -> list[list[int]]:
    """Row numbers of each shard: rows of one query stay together, so that no pair is judged in two shards."""
    by_query: dict[str, list[int]] = defaultdict(list)
    for row, query in enumerate(queries):
        by_query[query].append(row)
    shards: list[list[int]] = []
    for rows in by_query.values():
        if not shards or len(shards[-1]) >= shard_size:
            shards.append([])
        shards[-1] += rows
    return shards or [[]]


def _judge_shard(pools: Pools, judge: Judge, shards: ScoreShards, number: int, rows: list[dict[str, Any]]) -> None:
    wanted: dict[str, dict[str, None]] = defaultdict(dict)  # distinct candidates by query, in order
    for row in rows:
        wanted[row["query"]].update(dict.fromkeys([row["positive"], *row["candidates"]]))
    errors: list[PairError] = []
    groups = [Group(pools.item(query), list(map(pools.item, found))) for query, found in wanted.items()]
    answers = judge.score(groups, errors=errors)
    reasons = {(error.group, error.candidate): error.reason for error in errors}
    logits: dict[tuple[str, str], float] = {}
    failed: dict[tuple[str, str], str] = {}
    for group, (query, found) in enumerate(wanted.items()):
        if len(answers[group]) != len(found):
            raise ValueError(f"judge {judge.name} gave {len(answers[group])} scores for {len(found)} candidates")
        for index, (item, logit) in enumerate(zip(found, answers[group])):
            if (group, index) in reasons:
                failed[query, item] = reasons[group, index]
            elif np.isfinite(logit):
                logits[query, item] = float(logit)
            else:
                raise ValueError(f"judge {judge.name} gave {logit} for query {query}, candidate {item}")
    shards.write(number, rows, logits, failed)


def select_rows(
    scores: Scores | str | Path,
    output: str | Path,
    *,
    margin: float = 0.01,
    stride: int = 5,
    num_negatives: int = 10,
    seed: int = 0,
    relax_low_positive: bool = True,
    score_divisor: float = 1.0,
    min_positive_score: float = 0.0,
    overwrite: bool = False,
) -> RecordSet:
    """Choose the negatives of every judged pair: the training rows of UniME-V2.

    Args:
        scores: Judged pools, or their folder.
        output: Folder to write.
        margin: See :func:`~unime_st.judging.select.select_negatives`. Defaults to the paper's 0.01.
        stride: The same. Defaults to the paper's 5.
        num_negatives: The same. Defaults to the paper's 10.
        seed: Of the random draw where nothing survives; a row's draw does not depend on other rows.
        relax_low_positive: Where the positive scores below the margin, keep what scores lower still, as the one such
            record of the released files shows. Defaults to True; False is the rule as printed.
        score_divisor: Score = sigmoid(log-odds / divisor) for the margin. Defaults to 1; the released files were made
            with 1.05. The log-odds in the rows are not divided.
        min_positive_score: Score that every positive has at least, here and in the rows. Defaults to 0, the judge's own
            (the paper). 1 trusts who paired query and positive more than the judge: for a judge that cannot tell what
            the pairs differ in, and would have half of the hard negatives filtered and the rest tied with the positive.
        overwrite: Replace an output made with other options. Defaults to False.

    Returns:
        RecordSet: Judged records. Negatives taken because nothing survived count as matches (score 1.0) and carry the
        log-odds :data:`~unime_st.data.logits.CERTAIN_LOGIT`. Pairs without candidates are in ``rejected.jsonl``. The
        manifest holds the statistics: filtered false negatives, short and empty selections, histograms of scores and
        ranks.

    Raises:
        StageConflictError: If the output was made of something else and ``overwrite`` is False.
        ValueError: If an option makes no sense, or no pair has a candidate.

    References:
        UniME-V2 (https://arxiv.org/abs/2510.13515), false-negative filter (beta = 0.01) and cyclic sampling.

    Example:
        See :func:`judge_pools`.
    """
    scores = scores if isinstance(scores, Scores) else Scores(scores)
    output = Path(output)
    rule = {
        "margin": margin,
        "stride": stride,
        "num_negatives": num_negatives,
        "relax_low_positive": relax_low_positive,
    }
    if not 0 <= min_positive_score <= 1:
        raise ValueError(f"min_positive_score must be between 0 and 1, got {min_positive_score}")
    options = {**rule, "seed": seed, "score_divisor": score_divisor, "min_positive_score": min_positive_score}
    least = float(to_logits(min_positive_score, divisor=score_divisor)) if min_positive_score else -np.inf
    if not begin_stage(output, "select", inputs=[scores.folder], options=options, overwrite=overwrite):
        return RecordSet.load(output)
    link_items(scores.folder, output)
    statistics = _Statistics(num_negatives)
    with ShardWriter(output, "rows", ROW_SCHEMA) as shards, RejectedWriter(output) as rejected:
        rows = tqdm(scores.row_shards.rows(), total=len(scores), desc="selecting", unit="row")
        for number, row in enumerate(rows):
            if not row["candidates"]:
                rejected.add("no candidates to choose from", row=number, query=row["query"], positive=row["positive"])
                continue
            generator = np.random.default_rng([seed, number])
            row["positive_logit"] = max(row["positive_logit"], least)
            shards.add(_select(row, rule, score_divisor, generator, statistics))
    if shards.rows == 0:
        raise ValueError(f"{scores.folder}: none of {len(scores)} pairs has a candidate; mine with a higher ceiling")
    facts = {"rows": shards.rows, "rejected": rejected.count, "judge": scores.manifest["judge"]}
    facts |= {"image_root": scores.manifest.get("image_root"), "items": len(scores.items)}
    finish_stage(output, {**facts, "statistics": statistics.summary()})
    logger.info("select: %s", statistics)
    return RecordSet.load(output)


def _select(
    row: dict[str, Any],
    rule: dict[str, Any],
    divisor: float,
    generator: np.random.Generator,
    statistics: _Statistics,
) -> dict[str, Any]:
    pool = to_scores(row["logits"], divisor=divisor)
    positive = float(to_scores(row["positive_logit"], divisor=divisor))
    chosen, chosen_scores = select_negatives(pool, positive, generator=generator, **rule)
    relaxed = rule["relax_low_positive"] and positive <= rule["margin"]
    survives = pool < positive if relaxed else pool <= positive - rule["margin"]
    statistics.add(positive, pool, survives, chosen, chosen_scores)
    logits = [row["logits"][index] if survives.any() else CERTAIN_LOGIT for index in chosen]
    return {
        "query": row["query"],
        "positive": row["positive"],
        "dataset": row["dataset"],
        "negatives": [row["candidates"][index] for index in chosen],
        "positive_logit": row["positive_logit"],
        "negative_logits": logits,
    }


class _Statistics:
    """What selection did, over all rows."""

    def __init__(self, num_negatives: int) -> None:
        self.num_negatives = num_negatives
        self.counts = dict.fromkeys(
            ("rows", "candidates", "false_negatives_filtered", "rows_with_filtered", "short", "none_left"), 0
        )
        self.histograms = {name: np.zeros(_BINS, dtype=np.int64) for name in ("positive", "candidates", "negatives")}
        self.ranks = np.zeros(0, dtype=np.int64)

    def add(
        self, positive: float, pool: np.ndarray, survives: np.ndarray, chosen: np.ndarray, scores: np.ndarray
    ) -> None:
        filtered = int((~survives).sum())
        left = len(pool) - filtered
        for name, amount in (
            ("rows", 1),
            ("candidates", len(pool)),
            ("false_negatives_filtered", filtered),
            ("rows_with_filtered", filtered > 0),
            ("short", 0 < left < self.num_negatives),
            ("none_left", left == 0),
        ):
            self.counts[name] += int(amount)
        for name, values in (("positive", [positive]), ("candidates", pool), ("negatives", scores)):
            self.histograms[name] += np.histogram(values, bins=_BINS, range=(0.0, 1.0))[0]
        ranks = np.bincount(chosen)
        size = max(len(ranks), len(self.ranks))
        self.ranks = np.pad(self.ranks, (0, size - len(self.ranks))) + np.pad(ranks, (0, size - len(ranks)))

    def summary(self) -> dict[str, Any]:
        histograms = {name: counts.tolist() for name, counts in self.histograms.items()}
        return {**self.counts, "score_histograms": histograms, "rank_histogram": self.ranks.tolist()}

    def __str__(self) -> str:
        told = (
            "{rows} rows; {false_negatives_filtered} of {candidates} candidates filtered as false negatives, in "
            "{rows_with_filtered} rows; {short} rows had fewer than enough left, {none_left} none"
        ).format(**self.counts)
        tenths = {name: counts.reshape(10, -1).sum(1) for name, counts in self.histograms.items()}
        lines = [f"scores of {name} by tenths from 0 to 1: {_shares(counts)}" for name, counts in tenths.items()]
        steps = np.add.reduceat(self.ranks, range(0, len(self.ranks), 5)) if len(self.ranks) else self.ranks
        return "\n".join([told, *lines, f"ranks of the chosen by fives from the most similar: {_shares(steps)}"])


def _shares(counts: np.ndarray) -> str:
    return " ".join(f"{count / max(1, counts.sum()):.0%}" for count in counts)
