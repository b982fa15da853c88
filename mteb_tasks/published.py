"""Published scores of UniME (arXiv:2504.17432) and UniME-V2 (arXiv:2510.13515): precision at 1 in percent, by alias.

Retrieval columns have the direction that the numbers belong to (the papers' tables swap them).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PUBLISHED: dict[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
"""The whole file: scores, models with commands, data with revisions, ablations, and values measured elsewhere."""

_SCORES: dict[str, dict[str, dict[str, float]]] = PUBLISHED

MMEB = _SCORES["mmeb"]
"""Means over MMEB, by the names of `mteb_tasks.mmeb.tasks.mean_scores`."""

MMEB_TASKS = _SCORES["mmeb_tasks"]
"""Scores of single subsets, where a paper's table could be verified."""

CAPTIONS = _SCORES["captions"]
"""Share of queries with a right answer at rank 1, by task."""

COMPOSITION = _SCORES["composition"]
"""Group means of SugarCrepe."""
