"""Selection stage: from stored judge scores to training rows with hard negatives."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from unime_st.data.logits import CERTAIN_LOGIT, to_logits, to_scores
from unime_st.data.manifest import begin_stage, finish_stage, link_items
from unime_st.data.parquet_shards import Row, ShardWriter
from unime_st.data.records import ROW_SCHEMA, RecordSet
from unime_st.data.validation import RejectedWriter
from unime_st.files import locks_folder
from unime_st.judging.score_store import Scores
from unime_st.judging.select import select_negatives, surviving

logger = logging.getLogger(__name__)

_BINS = 20


@locks_folder("output", wait=True)
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
    """Choose the hard negatives of every judged pair: the training rows of UniME-V2.

    Args:
        scores: Judged pools, or their folder.
        output: Folder to write.
        margin: See :func:`~unime_st.judging.select.select_negatives`. Defaults to the paper's 0.01.
        stride: The same. Defaults to the paper's 5.
        num_negatives: The same. Defaults to the paper's 10.
        seed: Seed of the random draw where no candidate survives. The draw of a row does not depend on other rows.
        relax_low_positive: Where the positive scores below the margin, keep the candidates that score lower still, as
            the one such record of the released files shows. Defaults to True; False is the rule as printed.
        score_divisor: Score = sigmoid(log-odds / divisor) for the margin. Defaults to 1; the released files were made
            with 1.05. The log-odds in the rows are not divided.
        min_positive_score: Minimum score of every positive, for the filter and in the rows. Defaults to 0: the judge's
            own score (the paper). 1 trusts the pairs more than the judge, for a judge that cannot tell what the pairs
            differ in: it would filter half of the hard negatives and give the rest the positive's score.
        overwrite: Overwrite an output made with other options. Defaults to False.

    Returns:
        RecordSet: Judged records. Negatives taken because no candidate survived count as matches (score 1.0) and carry
        the log-odds :data:`~unime_st.data.logits.CERTAIN_LOGIT`. Pairs without candidates are in ``rejected.jsonl``.
        The manifest holds the statistics: filtered false negatives, short and empty selections, histograms of scores
        and ranks.

    Raises:
        StageConflictError: If the output was made from other scores or options and ``overwrite`` is False.
        ValueError: If an option is out of range, or no pair has a candidate.

    References:
        UniME-V2 (https://arxiv.org/abs/2510.13515), false-negative filter (beta = 0.01) and cyclic sampling.

    Example:
        See :func:`~unime_st.judging.judge_pools.judge_pools`.
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
        raise ValueError(
            f"{scores.folder}: none of {len(scores)} pairs has a candidate: mine with a higher max_similarity"
        )
    facts = {"rows": shards.rows, "rejected": rejected.count, "judge": scores.manifest["judge"]}
    facts |= {"image_root": scores.manifest.get("image_root"), "items": len(scores.items)}
    finish_stage(output, {**facts, "statistics": statistics.summary()})
    logger.info("select: %s", statistics)
    return RecordSet.load(output)


def _select(
    row: Row,
    rule: dict[str, Any],
    divisor: float,
    generator: np.random.Generator,
    statistics: _Statistics,
) -> Row:
    pool = to_scores(row["logits"], divisor=divisor)
    positive = float(to_scores(row["positive_logit"], divisor=divisor))
    chosen, chosen_scores = select_negatives(pool, positive, generator=generator, **rule)
    survives = surviving(pool, positive, rule["margin"], rule["relax_low_positive"])
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
    """Counts and histograms of a selection, over all rows."""

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

    def summary(self) -> dict[str, object]:
        histograms = {name: counts.tolist() for name, counts in self.histograms.items()}
        return {**self.counts, "score_histograms": histograms, "rank_histogram": self.ranks.tolist()}

    def __str__(self) -> str:
        summary = (
            "{rows} rows; {false_negatives_filtered} of {candidates} candidates filtered as false negatives, in "
            "{rows_with_filtered} rows; {short} rows had too few candidates left, {none_left} none"
        ).format(**self.counts)
        tenths = {name: counts.reshape(10, -1).sum(1) for name, counts in self.histograms.items()}
        lines = [f"scores of {name} by tenths from 0 to 1: {_shares(counts)}" for name, counts in tenths.items()]
        steps = np.add.reduceat(self.ranks, range(0, len(self.ranks), 5)) if len(self.ranks) else self.ranks
        return "\n".join([summary, *lines, f"ranks of the chosen by fives from the most similar: {_shares(steps)}"])


def _shares(counts: np.ndarray) -> str:
    return " ".join(f"{count / max(1, counts.sum()):.0%}" for count in counts)
