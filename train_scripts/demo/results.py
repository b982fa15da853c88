"""Results of a demo run: paired differences with their standard errors, what they say in words, and the table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy.special import stdtrit

from unime_st.data.scenes.twins import MEMBERS

MODELS = {
    "base": "untrained (unime-tiny)",
    "stage1": "UniME stage 1 (distilled)",
    "stage1_warm": "UniME stage 1, then in-batch InfoNCE",
    "warm": "in-batch InfoNCE (start of the compared models)",
    "in_batch": "control: in-batch InfoNCE, equal steps",
    "in_batch_compute": "control: in-batch InfoNCE, equal compute",
    "stage2": "UniME stage 2 (hardest of the batch)",
    "mined": "mined, no filter, hard labels",
    "similarity": "mined, similarity filter, hard labels",
    "judged": "mined, judge's filter, hard labels",
    "v2_published": "UniME-V2 as published",
    "v2": "UniME-V2 with in-batch term",
    "truth": "oracle: mined, filtered by the truth, hard labels",
    "soup": "weights of UniME-V2 and control averaged",
    "reranked": "UniME-V2 + judge as reranker, fused",
    "everything": "weights averaged + judge as reranker, fused",
    "compute_reranked": "control, equal compute + judge as reranker, fused",
    "pairwise": "UniME-V2 + trained reranker, pairwise as published",
    "listwise": "UniME-V2 + trained reranker, listwise as published",
    "trained_fused": "UniME-V2 + trained reranker, pairwise, fused",
}
"""Display names of the models, in display order."""
MAIN = ("base", "warm", "in_batch", "in_batch_compute", "mined", "judged", "v2", "truth", "reranked")
"""Models of the main run."""
DISTILLED = ("base", "stage1", "warm", "stage1_warm")
"""Models that show what stage 1 does, before and after later training."""
DISTILLED_METRICS = {"agreement": "rank agreement with the teacher", "paraphrases": "hit@1 of paraphrases"}
"""Column of each metric of those models."""


@dataclass(frozen=True)
class Reranking:
    """A model with a reranker behind it.

    Args:
        embedder: The model that retrieves.
        trained: Whether the reranker was trained; otherwise it is the judge.
        method: How the reranker is asked.
        fused: Whether its log-odds are added to the similarities; otherwise they alone order the best documents.
    """

    embedder: str
    trained: bool = False
    method: Literal["pairwise", "listwise"] = "pairwise"
    fused: bool = True


RERANKED = {
    "reranked": Reranking("v2"),
    "everything": Reranking("soup"),
    "compute_reranked": Reranking("in_batch_compute"),
    "pairwise": Reranking("v2", trained=True, fused=False),
    "listwise": Reranking("v2", trained=True, method="listwise", fused=False),
    "trained_fused": Reranking("v2", trained=True),
    "reranker": Reranking("warm", trained=True, fused=False),  # not in the table: for tuning
}
"""Models that are another one with a reranker behind it."""
CONTROL = "in_batch"
OTHER_PAIRS = (
    ("stage1_warm", "warm"),
    ("judged", "mined"),
    ("judged", "similarity"),
    ("judged", "truth"),
    ("v2", "judged"),
    ("v2", "in_batch_compute"),
    ("v2_published", "in_batch_compute"),
    ("v2_published", "v2"),
    ("reranked", "v2"),
    ("reranked", "compute_reranked"),
    ("everything", "compute_reranked"),
    ("pairwise", "v2"),
    ("listwise", "v2"),
    ("trained_fused", "v2"),
    ("trained_fused", "reranked"),
)
"""Pairs that are compared beside every model with the control."""
TASKS = {
    "twins_t2i": "ScenesTwinsT2IRetrieval",
    "twins_i2t": "ScenesTwinsI2TRetrieval",
    "vqa": "ScenesVQA",
    "grounding": "ScenesGrounding",
}
"""Name in mteb of each retrieval task."""
COLUMNS = {
    "caption to image": ("twins_t2i", "ndcg_at_10"),
    "image to caption": ("twins_i2t", "ndcg_at_10"),
    "VQA": ("vqa", "hit_rate_at_1"),
    "grounding": ("grounding", "hit_rate_at_1"),
    "compositional": ("compositional", "accuracy"),
}
"""Task and metric of each column of the table."""
DIRECTIONS = ("caption to image", "image to caption")
"""Columns whose mean models are compared by."""
MEAN = "mean"
"""The measure that models are compared by: nDCG@10, mean of both directions."""
REPORT = "report.html"
"""File name of the report in the folder of a run."""
# Stages that a model takes after the one that all start from, where they are not its own training alone.
_STAGES = {
    "mined": ("mine", "mined"),
    "similarity": ("mine", "similarity"),
    "truth": ("mine", "truth"),
    "warm": (),
    "stage1_warm": ("stage1", "stage1_warm"),
    **{name: ("mine", "judge", name) for name in ("judged", "v2", "v2_published")},
    **dict.fromkeys(("soup", "everything"), ("mine", "judge", "v2", "in_batch", "soup")),
    "reranked": ("mine", "judge", "v2"),
    "compute_reranked": ("in_batch_compute",),
    **dict.fromkeys(("pairwise", "listwise", "trained_fused"), ("mine", "judge", "v2", "reranker")),
}


@dataclass(frozen=True)
class Difference:
    """Paired difference of two models as a fraction, and its standard error.

    Args:
        mean: The difference.
        error: Its standard error; None for a single value.
        limit: Standard errors beyond which the two are told apart (95 %).
    """

    mean: float
    error: float | None
    limit: float = 2.0

    @classmethod
    def of(cls, values: list[float]) -> Difference:
        """Difference of paired values; of few of them, the limit is Student's."""
        if len(values) < 2:
            return cls(statistics.fmean(values), None)
        error = statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.fmean(values), error, float(stdtrit(len(values) - 1, 0.975)))

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {100 * self.error:.1f}"
        return f"{round(100 * self.mean, 1) + 0.0:+.1f}".replace("-", "−") + error  # no minus sign on a zero

    def verdict(self, other: str) -> str:
        """The difference in words; one without an error does not tell the models apart."""
        apart = self.error is not None and abs(self.mean) > self.limit * self.error
        return f"{('ahead of' if self.mean > 0 else 'behind') if apart else 'not told apart from'} {other} ({self})"


def paired(found: Mapping[str, Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Compare the models of a seed, query by query.

    Args:
        found: What evaluation wrote, by model: "ndcg" by task and query.
        seed: The seed.

    Returns:
        Rows of seed, model, other, task, difference and error: of each direction, and as ``"mean"`` of the differences
        of both for the same scene. The standard error is over families, whose queries resemble each other.
    """
    pairs = [(model, CONTROL) for model in found if model != CONTROL]
    rows = []
    for model, other in [*pairs, *(pair for pair in OTHER_PAIRS if set(pair) <= found.keys())]:
        ours, theirs = found[model]["ndcg"], found[other]["ndcg"]
        gains = {task: {query: ours[task][query] - theirs[task][query] for query in ours[task]} for task in ours}
        gains[MEAN] = {query: statistics.fmean(part[query] for part in gains.values()) for query in gains["twins_t2i"]}
        for task, values in gains.items():
            known = {"seed": seed, "model": model, "other": other, "task": task}
            error = Difference.of(_by_family(values)).error
            rows.append({**known, "difference": statistics.fmean(values.values()), "error": error})
    return rows


def _by_family(gains: Mapping[str, float]) -> list[float]:
    families: dict[int, list[float]] = {}
    for query, gain in gains.items():
        families.setdefault(int(query.removeprefix("q")) // MEMBERS, []).append(gain)
    return [statistics.fmean(values) for values in families.values()]


class DemoResults:
    """Content of a demo's ``results.json``.

    Args:
        content: The decoded file: "rows" of model, seed, task, metric and value; "paired" from :func:`paired`; "judge"
            from :func:`~train_scripts.demo.filters.judge_quality`; "distillation" from
            :func:`~train_scripts.demo.distillation.measure_distillation`, empty where stage 1 was not run; "seconds"
            by stage.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        present = {row["model"] for row in content["rows"]}
        self.models = [model for model in MODELS if model in present]
        self.seeds = sorted({row["seed"] for row in content["rows"]})

    def value(self, model: str, column: str) -> float:
        """Mean over seeds of a column of :data:`COLUMNS`, or of :data:`MEAN`."""
        if column == MEAN:
            return statistics.fmean(self.value(model, name) for name in DIRECTIONS)
        wanted = (model, *COLUMNS[column])
        rows = self.content["rows"]
        return statistics.fmean(r["value"] for r in rows if (r["model"], r["task"], r["metric"]) == wanted)

    def difference(self, model: str, other: str = CONTROL, task: str = MEAN) -> Difference | None:
        """Difference of two models, None if they were not compared.

        The standard error is over families of queries for one seed, and over seeds for several.
        """
        wanted = (model, other, task)
        rows = [row for row in self.content["paired"] if (row["model"], row["other"], row["task"]) == wanted]
        if len(rows) == 1:
            return Difference(rows[0]["difference"], rows[0]["error"])
        return Difference.of([row["difference"] for row in rows]) if rows else None

    def seconds(self, model: str) -> float | None:
        """CPU seconds of the stages that a model takes after the common start, mining and judging included."""
        stages = self.content["seconds"]
        own = [stages[name] for name in _STAGES.get(model, (model,)) if name in stages]
        return sum(own) if own else None

    def sentences(self) -> list[str]:
        """What the run shows and does not show, in three sentences, whatever the signs."""
        return [self._oracle(), self._method(), self._limits()]

    def _oracle(self) -> str:
        oracle, plain = self.difference("truth"), self.difference("mined")
        if oracle is None or plain is None:
            return "Without the oracle or the unfiltered negatives the run does not say whether there is a problem."
        return (
            f"Mined negatives filtered by the truth (oracle) are {oracle.verdict('the equal-steps control')}, mined "
            f"negatives without a filter {plain.verdict('it')}: points of nDCG@10, mean of both directions."
        )

    def _method(self) -> str:
        pairs = (
            ("the judge's filter", "judged", CONTROL, "the control"),
            ("that filter", "judged", "mined", "no filter"),
            ("UniME-V2", "v2", CONTROL, "the control"),
            ("UniME-V2", "v2", "in_batch_compute", "in-batch training with equal compute"),
            ("UniME-V2", "v2", "judged", "the same negatives with hard labels"),
            ("the reranker fused with UniME-V2", "reranked", "v2", "UniME-V2 alone"),
            ("the reranker fused with UniME-V2", "reranked", "compute_reranked", "the same behind equal compute"),
        )
        said = [
            f"{name} is {found.verdict(beside)}"
            for name, model, other, beside in pairs
            if (found := self.difference(model, other))
        ]
        sentence = "; ".join(said) or "the method itself was not run"
        return sentence[0].upper() + sentence[1:] + "."

    def _limits(self) -> str:
        seeds = len(self.seeds)
        error = (
            "one seed, whose errors are over families of queries and say nothing of another training"
            if seeds == 1
            else f"{seeds} seeds of training with one test set, over which the errors are"
        )
        return (
            f"This is a model of 1.4 million parameters on drawn scenes, {error}: the run shows that the parts work "
            f"together, not how large a gain to expect."
        )


def table_rows(results: DemoResults) -> list[list[str]]:
    """Head and rows of the table: percent, and the paired difference from the control."""
    others = [column for column in COLUMNS if column not in DIRECTIONS]
    rows = [["model", *DIRECTIONS, MEAN, "− control", *others, "CPU s"]]
    for model in results.models:
        values = {column: f"{100 * results.value(model, column):.1f}" for column in [*COLUMNS, MEAN]}
        seconds, difference = results.seconds(model), results.difference(model)
        rows.append(
            [
                MODELS[model],
                *(values[column] for column in (*DIRECTIONS, MEAN)),
                "–" if difference is None else str(difference),
                *(values[column] for column in others),
                "–" if seconds is None else f"{seconds:.0f}",
            ]
        )
    return rows


def distillation_rows(results: DemoResults) -> list[list[str]]:
    """Head and rows of the table about stage 1: percent ± standard error, over captions for one seed; nDCG@10."""
    rows = [["model", *DISTILLED_METRICS.values(), "nDCG@10"]]
    for model in DISTILLED:
        found = [_with_error(results, model, metric) for metric in DISTILLED_METRICS]
        rows.append([MODELS[model], *found, f"{100 * results.value(model, MEAN):.1f}"])
    return rows


def _with_error(results: DemoResults, model: str, metric: str) -> str:
    rows = [row for row in results.content["distillation"] if (row["model"], row["metric"]) == (model, metric)]
    values = [row["value"] for row in rows]
    error = rows[0]["error"] if len(rows) == 1 else Difference.of(values).error
    return f"{100 * statistics.fmean(values):.1f} ± {100 * (error or 0.0):.1f}"


def render_table(rows: Sequence[Sequence[str]]) -> str:
    """Render head and rows as a Markdown table."""
    head, *rows = rows
    rule = [":---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
