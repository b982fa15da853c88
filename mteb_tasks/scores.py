"""Scores as the papers tabulate them: single tasks, then means, published numbers beside them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mteb_tasks import published
from mteb_tasks.local_data import without_digest
from mteb_tasks.mmeb.subsets import META_TASKS, SUBSETS
from mteb_tasks.mmeb.tasks import mean_scores
from mteb_tasks.mmeb_v2.comparison import SubsetScores, TaskScores, compared_rows, comparison_table, profiles_of
from mteb_tasks.mmeb_v2.leaderboard import AGGREGATE
from mteb_tasks.preference_task import group_means
from mteb_tasks.sugarcrepe import CATEGORIES, SugarCrepeByCategory

Scores = dict[str, dict[str, dict[str, Any]]]
"""``{task: {subset: {metric: value}}}``"""

_MEANS = {"mean": "overall", "ind": "IND", "ood": "OOD", **{name: name for name in META_TASKS}}
_METRICS = {"hit": "hit_rate", "recall": "recall"}
_CAPTION_MEANS = {"short captions mean": ("Flickr30k1k", "COCO5k"), "long captions mean": ("ShareGPT4V", "Urban1K")}
_CAPTIONS = {
    f"{source}{direction}Retrieval": (index, direction)
    for index, source in enumerate(source for sources in _CAPTION_MEANS.values() for source in sources)
    for direction in ("T2I", "I2T")
}
CAPTION_METRICS = {f"{name}@{k}": f"{key}_at_{k}" for name, key in _METRICS.items() for k in (1, 5, 10)}
"""What is shown of caption tasks beside the score, and how mteb calls it. Recall divides by all right answers."""
_ORDER = {f"MMEB-{subset.name}": index for index, subset in enumerate(SUBSETS)}


@dataclass(frozen=True)
class Row:
    """One line of a score table.

    Args:
        name: Task, category or mean.
        score: In per cent.
        published: The same in the papers, in per cent; None where they have no such number.
        is_mean: Whether it sums up other lines.
    """

    name: str
    score: float
    published: float | None = None
    is_mean: bool = False

    @property
    def difference(self) -> float | None:
        """Score minus published score as it is shown, None where nothing was published."""
        return None if self.published is None else round(self.score - self.published, 1) + 0.0


def score_rows(scores: TaskScores, model: str) -> list[Row]:
    """Lay scores out in the order of the papers' tables.

    Args:
        scores: ``{task: {subset: scores}}``.
        model: Alias, to look published numbers up.

    Returns:
        MMEB's subsets and their means, those of MMEB-V2, then the other tasks and theirs.

    Example:
        >>> score_rows({"MMEB-GQA": {"default": {"main_score": 0.5}}}, "unime-v2")[0].score
        50.0
    """
    profiles = profiles_of(scores)
    of_v2 = [
        Row(f"{row.name} ({profile})" if len(profiles) > 1 else row.name, row.score, is_mean=row.is_mean)
        for profile in profiles
        for row in compared_rows(scores, profile)
    ]
    return [*_mmeb_rows(scores, model), *of_v2, *_other_rows(scores, model)]


def score_table(scores: TaskScores, model: str) -> str:
    """Lay scores out as text, published numbers beside them.

    Args:
        scores: ``{task: {subset: scores}}``.
        model: Alias, to look published numbers up.

    Returns:
        The table; empty when there is no score.

    Example:
        >>> print(score_table({"MMEB-GQA": {"default": {"main_score": 0.5}}}, "unime-v2"))  # doctest: +ELLIPSIS
        unime-v2 ...
    """
    compared = comparison_table(scores)
    rows = [row for row in score_rows(scores, model) if not row.name.startswith(AGGREGATE)]
    if not rows:
        return compared
    width = max(len(name) for name in (model, *(row.name for row in rows)))
    lines = [f"{model:<{width}}  score  published  difference", "-" * (width + 31)]
    for row in rows:
        beside = "" if row.published is None else f"  {row.published:9.1f}  {row.difference:+10.1f}"
        lines.append(f"{row.name:<{width}}  {row.score:5.1f}{beside}")
    captions = caption_metrics(scores)
    if captions:
        width = max(map(len, captions))
        lines += ["", f"{'captions':<{width}}  " + "  ".join(f"{name:>9}" for name in CAPTION_METRICS)]
        lines.append("-" * (width + 11 * len(CAPTION_METRICS)))
        for task, found in captions.items():
            lines.append(f"{task:<{width}}  " + "  ".join(f"{found[name]:9.1f}" for name in CAPTION_METRICS))
    return "\n".join([*lines, *(["", compared] if compared else [])])


def caption_metrics(scores: TaskScores) -> dict[str, dict[str, float]]:
    """How often a right caption or image is among the first ones.

    Args:
        scores: ``{task: {subset: scores}}``.

    Returns:
        ``{task: {name: per cent}}`` of the caption tasks, with the names of `CAPTION_METRICS`.

    Example:
        >>> caption_metrics({"MMEB-GQA": {"default": {"main_score": 0.5}}})
        {}
    """
    found = {task: next(iter(scores[task].values())) for task in _CAPTIONS if scores.get(task)}
    return {
        task: {name: 100 * float(row[key]) for name, key in CAPTION_METRICS.items()}
        for task, row in found.items()
        if all(key in row for key in CAPTION_METRICS.values())
    }


def _mmeb_rows(scores: TaskScores, model: str) -> Iterator[Row]:
    names = sorted((name for name in scores if name in _ORDER and scores[name]), key=_ORDER.__getitem__)
    tasks = {name.removeprefix("MMEB-"): 100 * _main_score(scores[name]) for name in names}
    known = published.MMEB_TASKS.get(model, {})
    yield from (Row(f"MMEB-{name}", score, known.get(name)) for name, score in tasks.items())
    count, means = len(tasks), mean_scores(tasks)
    if not tasks and scores.get("MMEB"):  # the aggregate's own file, without those of its parts
        whole = next(iter(scores["MMEB"].values()))
        count = int(whole.get("num_tasks", 0))
        means = {name: 100 * float(whole[name]) for name in _MEANS if name in whole}
    if count < 2:
        return
    # Published means are over all subsets: beside means over a part they would mislead.
    reference = published.MMEB.get(model, {}) if count == len(SUBSETS) else {}
    label = "MMEB" if count == len(SUBSETS) else f"MMEB ({count} of {len(SUBSETS)})"
    for name in [*META_TASKS, "ind", "ood", "mean"]:
        if name in means:
            yield Row(f"{label} {_MEANS[name]}", means[name], reference.get(name), is_mean=True)


def _other_rows(scores: TaskScores, model: str) -> Iterator[Row]:
    captions = published.CAPTIONS.get(model, {})
    single: dict[str, float] = {}
    for task in sorted(scores, key=lambda name: (name not in _CAPTIONS, _CAPTIONS.get(name, ()))):
        found = scores[task]
        if task in _ORDER or task == "MMEB" or task.startswith(AGGREGATE) or not found:
            continue
        subsets = {without_digest(name): 100 * float(row["main_score"]) for name, row in found.items()}
        groups = group_means(subsets)
        if len(subsets) == 1 and not groups:
            single[task] = next(iter(subsets.values()))
            yield Row(task, single[task], captions.get(task))
            continue
        yield from (Row(f"{task} {name}", score) for name, score in subsets.items())
        known = published.COMPOSITION.get(model, {}) if task == SugarCrepeByCategory.metadata.name else {}
        if known:
            known = {**known, "mean": round(statistics.fmean(known.values()), 1)}
        for category in set(CATEGORIES) - subsets.keys():  # published means are over all categories
            known = {name: score for name, score in known.items() if name not in (category.split("_")[0], "mean")}
        yield from (Row(f"{task} {name}", score, known.get(name), is_mean=True) for name, score in groups.items())
    for label, sets in _CAPTION_MEANS.items():
        names = [name for name in _CAPTIONS if name.startswith(sets)]
        if all(name in single for name in names):
            reference = round(statistics.fmean(captions[name] for name in names), 1) if captions else None
            yield Row(label, statistics.fmean(single[name] for name in names), reference, is_mean=True)


def _main_score(subsets: SubsetScores) -> float:
    return float(next(iter(subsets.values()))["main_score"])
