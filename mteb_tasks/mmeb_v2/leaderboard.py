"""Table of the 78 tasks of MMEB-V2 with the 12 columns of its leaderboard, and the means over them.

The overall score is the plain mean of the 78 task scores; the score of a modality or column is the plain mean of its
tasks (VLM2Vec-V2, arXiv:2507.04590).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from mteb_tasks.mmeb.subsets import SUBSETS
from mteb_tasks.mmeb_v2.visdoc_sets import VISDOC_SETS

BENCHMARK = "MMEB(eng, v2)"
"""Name of the benchmark; mteb's ``-b`` takes it, ``-t`` takes the aggregate task `AGGREGATE`."""
AGGREGATE = "MMEB-V2"

COLUMNS: dict[str, tuple[str, ...]] = {
    "Image": ("Image CLS", "Image QA", "Image RET", "Image VG"),
    "Video": ("Video CLS", "Video QA", "Video RET", "Video MRET"),
    "VisDoc": ("ViDoRe-v1", "ViDoRe-v2", "VisRAG", "VisDoc OOD"),
}
"""Columns of the leaderboard by modality."""

_IMAGE_COLUMNS = {
    "classification": "Image CLS",
    "vqa": "Image QA",
    "retrieval": "Image RET",
    "grounding": "Image VG",
}
_VIDEO_KEYS = {
    "Video CLS": "K700 SmthSmthV2 HMDB51 UCF101 Breakfast",
    "Video QA": "MVBench Video-MME NExTQA EgoSchema ActivityNetQA",
    "Video RET": "DiDeMo MSR-VTT MSVD VATEX YouCook2",
    "Video MRET": "QVHighlight Charades-STA MomentSeeker",
}


@dataclass(frozen=True)
class LeaderboardTask:
    """One of the 78 tasks.

    Args:
        key: Name on the leaderboard.
        column: Column of the leaderboard.
        metric: Main score as mteb names it.
    """

    key: str
    column: str
    metric: str = "hit_rate_at_1"

    @property
    def modality(self) -> str:
        """``"Image"``, ``"Video"`` or ``"VisDoc"``."""
        return next(name for name, columns in COLUMNS.items() if self.column in columns)

    @property
    def task_name(self) -> str:
        """Name of the mteb task."""
        return f"{AGGREGATE}-{self.key}"


LEADERBOARD: tuple[LeaderboardTask, ...] = (
    *(LeaderboardTask(subset.name, _IMAGE_COLUMNS[subset.meta]) for subset in SUBSETS),
    *(LeaderboardTask(key, column) for column, keys in _VIDEO_KEYS.items() for key in keys.split()),
    *(LeaderboardTask(row.key, row.column, "ndcg_at_5") for row in VISDOC_SETS),
)
"""All tasks in the order of the leaderboard."""


def leaderboard_means(score_of: Mapping[str, float]) -> dict[str, float]:
    """Average task scores as the leaderboard does; a mean with a missing task is left out.

    Args:
        score_of: Score by leaderboard key.

    Returns:
        Means by column, by modality (``"Image"``, ``"Video"``, ``"VisDoc"``) and ``"Overall"``, each only if the scores
        of all its tasks are there.

    Example:
        >>> scores = {key: 0.5 for key in ("MSCOCO", "RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing")}
        >>> leaderboard_means(scores)
        {'Image VG': 0.5}
    """
    groups: dict[str, list[LeaderboardTask]] = {
        column: [task for task in LEADERBOARD if task.column == column]
        for columns in COLUMNS.values()
        for column in columns
    }
    groups |= {name: [task for task in LEADERBOARD if task.modality == name] for name in COLUMNS}
    groups["Overall"] = list(LEADERBOARD)
    return {
        name: statistics.fmean(score_of[task.key] for task in tasks)
        for name, tasks in groups.items()
        if all(task.key in score_of for task in tasks)
    }
