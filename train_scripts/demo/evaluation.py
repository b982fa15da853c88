"""Evaluation of the demo's models with mteb."""

from __future__ import annotations

import statistics
from functools import lru_cache
from pathlib import Path
from typing import Any

from mteb_tasks.in_process import Scores
from mteb_tasks.in_process import evaluate as run_mteb
from mteb_tasks.loader import wrap
from mteb_tasks.two_stage import TwoStage
from train_scripts.demo.results import EVERYTHING, TASKS
from train_scripts.demo.seed import Seed
from train_scripts.demo.settings import COMPOSITIONAL, FUSED, GROUPS, RERANKED, DemoArguments
from unime_st.files import write_json
from unime_st.model import UniME
from unime_st.reranking.unime_reranker import UniMEReranker


def evaluate(arguments: DemoArguments, seed: int, model: str, results: Path) -> None:
    """Evaluate one model of a seed; its rows of ``results.json`` go to a file."""
    scores = run_mteb(_load(Seed(arguments, seed), model), _tasks(arguments.eval_size), results.parent)
    write_json(results, {"rows": _rows(scores, model, seed)})


def _rows(scores: Scores, model: str, seed: int) -> list[dict[str, Any]]:
    """Rows of ``results.json`` of one model."""
    rows = []
    for name, task in TASKS.items():
        (numbers,) = scores[task].values()
        rows.append({"task": name, "metric": "hit_rate_at_1", "value": numbers["hit_rate_at_1"]})
    accuracy = {category: numbers["text_acc"] for category, numbers in scores[COMPOSITIONAL].items()}
    accuracy |= {group: statistics.fmean(accuracy[name] for name in names) for group, names in GROUPS.items()}
    rows += [{"task": "compositional", "metric": name, "value": value} for name, value in accuracy.items()]
    return [{"model": model, "seed": seed, **row} for row in rows]


@lru_cache(maxsize=1)  # drawn once in a process
def _tasks(size: int) -> list[Any]:
    from mteb_tasks import scenes

    return [
        *(getattr(scenes, task)(size=size) for task in TASKS.values()),
        getattr(scenes, COMPOSITIONAL)(size=size // 2),
    ]


def _load(run: Seed, model: str) -> Any:
    if model == "base":
        return UniME("unime-tiny")
    if model == EVERYTHING:
        judge, alpha = UniMEReranker("unime-tiny", template="tiny"), 1 / run.arguments.temperature
        return TwoStage(
            wrap(UniME(run.path("soup"))),
            judge,
            top_k=FUSED,
            method="pairwise",
            batch_size=128,
            pair_order="both",
            alpha=alpha,
        )
    if model != "v2_reranker":
        return UniME(run.path(model))
    reranker = UniMEReranker(run.path("reranker"), template="tiny")
    return TwoStage(wrap(UniME(run.path("v2"))), reranker, top_k=RERANKED, method="pairwise", batch_size=128)
