"""Evaluation of a model in memory on our tasks, with plain numbers as the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mteb
from sentence_transformers import SentenceTransformer

from mteb_tasks.loader import UniMELoader, wrap
from mteb_tasks.registration import register_all
from mteb_tasks.two_stage import TwoStage

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.models.models_protocols import MTEBModels
    from mteb.types import EncodeKwargs

Scores = dict[str, dict[str, dict[str, float]]]
"""``{task: {subset: {metric: value}}}``"""


def evaluate(
    model: SentenceTransformer | UniMELoader | TwoStage,
    tasks: Iterable[str | AbsTask],
    output_folder: str | Path | None = None,
    *,
    batch_size: int = 64,
    show_progress_bar: bool = False,
) -> Scores:
    """Run ``mteb.evaluate`` and return its numbers.

    Task data are loaded once per process for tasks given by name, and once per object for task objects, whatever the
    number of models.

    Args:
        model: A SentenceTransformer, a loader from `wrap`, or a two-stage model.
        tasks: Names or task objects.
        output_folder: Where ``<task>_predictions.json`` files go: ranked document ids with scores of each query
            (``{subset: {"test": {query: {document: score}}}}``), or the two scores of each compositional pair. None
            writes nothing.
        batch_size: Items per forward pass.
        show_progress_bar: Show bars.

    Returns:
        ``{task: {subset: {metric: value}}}`` with every number mteb computed, ``main_score`` included.

    Example:
        >>> from mteb_tasks.scenes import ScenesVQA
        >>> evaluate(model, [ScenesVQA(size=50)])["ScenesVQA"]["default"]["hit_rate_at_1"]  # doctest: +SKIP
        0.62
    """
    wrapped = wrap(model) if isinstance(model, SentenceTransformer) else model
    chosen = [_task(task) if isinstance(task, str) else task for task in tasks]
    for task in chosen:
        task.load_data()  # before mteb does, which would drop the data after every model
    result = mteb.evaluate(
        cast("MTEBModels", wrapped),
        chosen,
        cache=None,
        co2_tracker=False,
        encode_kwargs=cast("EncodeKwargs", {"batch_size": batch_size, "show_progress_bar": show_progress_bar}),
        prediction_folder=None if output_folder is None else Path(output_folder),
        show_progress_bar=show_progress_bar,
    )
    return {found.task_name: _numbers(found.scores) for found in result.task_results}


@lru_cache(maxsize=64)
def _task(name: str) -> AbsTask:
    register_all()
    return mteb.get_task(name)


def _numbers(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    return {
        entry["hf_subset"]: {key: float(value) for key, value in entry.items() if isinstance(value, (int, float))}
        for entries in scores.values()
        for entry in entries
    }
