"""Scores of MMEB-V2 beside those of published models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any

from mteb_tasks.mmeb_v2.leaderboard import AGGREGATE, LEADERBOARD, leaderboard_means
from mteb_tasks.mmeb_v2.profiles import profile_name

SubsetScores = Mapping[str, Mapping[str, Any]]
"""``{subset: {metric: value}}``"""
TaskScores = Mapping[str, SubsetScores]
"""``{task: {subset: {metric: value}}}``"""
OFFICIAL_METRIC = "ndcg_at_5_official"
_NO_OVERALL = (
    "No overall score: {missing} of 78 tasks are missing. Published models were each run with their own prompts, see "
    "docs/mmeb_v2.md."
)


@dataclass(frozen=True)
class PublishedModel:
    """Published scores of a model, in per cent.

    Args:
        label: Short name, for the head of a column.
        name: Full name.
        protocol: The prompts it was run with.
        source: Where the scores are published.
        scores: Score by leaderboard key, by column, by modality and ``"Overall"``, as far as they are published.
    """

    label: str
    name: str
    protocol: str
    source: str
    scores: Mapping[str, float]


@lru_cache(maxsize=1)
def published_models() -> tuple[PublishedModel, ...]:
    """Published models, the lowest overall score first; means that follow from scores of all tasks are computed.

    Example:
        >>> [round(model.scores["Overall"], 1) for model in published_models()]
        [59.1, 73.2, 77.8, 77.9, 79.2, 80.6]
    """
    content = json.loads((files("mteb_tasks.mmeb_v2") / "published_v2.json").read_text(encoding="utf-8"))
    return tuple(
        PublishedModel(
            found["label"],
            name,
            found["protocol"],
            found["source"],
            {**leaderboard_means(found["tasks"]), **found["means"], **found["tasks"]},
        )
        for name, found in content["models"].items()
    )


@dataclass(frozen=True)
class ComparedRow:
    """A task or mean of MMEB-V2.

    Args:
        name: Name of the task, or of the mean.
        score: In per cent.
        official: The same with the nDCG of the released code, which published scores were made with; None where there
            is no difference between the two.
        is_mean: Whether it sums up tasks.
        published: Published scores by label of the model.
    """

    name: str
    score: float
    official: float | None = None
    is_mean: bool = False
    published: Mapping[str, float] = field(default_factory=dict)


def profiles_of(scores: TaskScores) -> list[str]:
    """Names of the profiles that scores of MMEB-V2 were made with.

    Args:
        scores: ``{task: {subset: scores}}``; other tasks are left out.
    """
    rows = (row for task in LEADERBOARD for row in scores.get(task.task_name, {}).values())
    return list(dict.fromkeys(profile_name(str(row.get("profile"))) for row in rows))


def compared_rows(scores: TaskScores, profile: str) -> list[ComparedRow]:
    """Lay the scores of MMEB-V2 out as the leaderboard does.

    Args:
        scores: ``{task: {subset: scores}}``; other tasks are left out.
        profile: Name of the profile; scores of another are left out.

    Returns:
        Tasks in the order of the leaderboard, then the means whose tasks are all there.
    """
    own, official = {}, {}
    for task in LEADERBOARD:
        for row in scores.get(task.task_name, {}).values():
            if profile_name(str(row.get("profile"))) == profile:
                own[task.key] = 100 * float(row["main_score"])
                official[task.key] = 100 * float(row.get(OFFICIAL_METRIC, row["main_score"]))
    means = leaderboard_means(own)
    official |= leaderboard_means(official)
    names = {task.key: task.task_name for task in LEADERBOARD} | {name: f"{AGGREGATE} {name}" for name in means}
    beside = {model.label: model.scores for model in published_models()}
    return [
        ComparedRow(
            name=names[key],
            score=score,
            official=None if official[key] == score else official[key],
            is_mean=key in means,
            published={label: found[key] for label, found in beside.items() if key in found},
        )
        for key, score in {**own, **means}.items()
    ]


def comparison_table(scores: TaskScores) -> str:
    """Lay the scores of MMEB-V2 out as text, published models beside them.

    Args:
        scores: ``{task: {subset: scores}}``.

    Returns:
        For each profile the table and what is missing for an overall score; empty when there is no score of MMEB-V2.

    Example:
        >>> print(comparison_table({"MMEB-V2-VisRAG_ChartQA": {"vlm2vec": {"main_score": 0.8, "profile": "vlm2vec"}}}))
        MMEB-V2 (profile vlm2vec)  score  official  VLM2Vec-V2 2B ...
    """
    return "\n\n".join(_table(compared_rows(scores, profile), profile) for profile in profiles_of(scores))


def _table(rows: Sequence[ComparedRow], profile: str) -> str:
    head = f"{AGGREGATE} (profile {profile})"
    labels = [model.label for model in published_models()]
    width = max(len(head), *(len(row.name) for row in rows))
    lines = [f"{head:<{width}}  score  official  " + "  ".join(labels)]
    lines.append("-" * len(lines[0]))
    for row in rows:
        official = "" if row.official is None else f"{row.official:.1f}"
        beside = (f"{row.published[label]:.1f}" if label in row.published else "" for label in labels)
        cells = "  ".join(f"{cell:>{len(label)}}" for cell, label in zip(beside, labels))
        lines.append(f"{row.name:<{width}}  {row.score:5.1f}  {official:>8}  {cells}".rstrip())
    missing = missing_tasks(rows)
    return "\n".join([*lines, *([_NO_OVERALL.format(missing=missing)] if missing else [])])


def missing_tasks(rows: Sequence[ComparedRow]) -> int:
    """Number of the 78 tasks that have no score.

    Args:
        rows: From `compared_rows`.
    """
    return len(LEADERBOARD) - sum(not row.is_mean for row in rows)
