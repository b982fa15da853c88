"""Hook around ``mteb.evaluate``: plain SentenceTransformers on the tasks of this package.

mteb takes a SentenceTransformer object for a text model: it refuses it on tasks where a side is an image and drops the
images of all others. On the tasks of this package, and only there, the model runs with our loader instead.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeGuard

from mteb.abstasks import AbsTask
from mteb.benchmarks.benchmark import Benchmark
from mteb.results import ModelResult, TaskResult

from mteb_tasks.mmeb.base_tasks import checked_together
from mteb_tasks.run_context import current_run
from mteb_tasks.task_base import UniMETask, check_modalities, follow_environment, is_ours

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from mteb_tasks.loader import UniMELoader

Evaluate = Callable[..., ModelResult]
CheckCache = Callable[..., tuple[TaskResult | None, dict[str, list[str]]]]


def with_our_tasks(evaluate: Evaluate) -> Evaluate:
    """Wrap ``mteb.evaluate``.

    Args:
        evaluate: mteb's function.

    Returns:
        A function with the same arguments. It does the same unless a SentenceTransformer object meets a task of this
        package. In a list with tasks of others, these are evaluated by mteb's own rules.
    """

    @functools.wraps(evaluate)
    def evaluate_with_our_tasks(model: object, tasks: object, *args: object, **kwargs: object) -> ModelResult:
        listed = _listed(tasks)
        ours = [task for task in listed if is_ours(task)]
        for task in ours:
            follow_environment(task)
        run = current_run()
        if run is not None and ours:
            run.tasks += ours
            run.model_meta = getattr(model, "mteb_model_meta", None)
        with checked_together(ours):
            if not ours or not _is_sentence_transformer(model):
                return evaluate(model, tasks, *args, **kwargs)
            loader = _loader(model, ours)
            if len(ours) == len(listed):
                return evaluate(loader, tasks, *args, **kwargs)
            others = [task for task in listed if not is_ours(task)]
            result = evaluate(model, others, *args, **kwargs)
            return _merged(result, evaluate(loader, ours, *args, **kwargs), listed)

    return evaluate_with_our_tasks


def without_other_data(check_cache: CheckCache) -> CheckCache:
    """Wrap mteb's look at stored scores, which compares the names of subsets and not the revision of the data.

    Args:
        check_cache: mteb's function.

    Returns:
        A function that finds none of other data for tasks that tell their data by the revision.
    """

    @functools.wraps(check_cache)
    def check_cache_of_data(
        task: AbsTask, meta: object, cache: object, overwrite_strategy: object
    ) -> tuple[TaskResult | None, dict[str, list[str]]]:
        found, missing = check_cache(task, meta, cache, overwrite_strategy)
        follows = isinstance(task, UniMETask) and task.scores_follow_revision
        if follows and found is not None and found.dataset_revision != task.metadata.revision:
            return check_cache(task, meta, None, overwrite_strategy)
        return found, missing

    return check_cache_of_data


def _listed(tasks: object) -> Sequence[AbsTask]:
    """The tasks of a call. An iterator is not looked into: that would consume it."""
    if isinstance(tasks, AbsTask):
        return [tasks]
    if isinstance(tasks, Benchmark):
        return list(tasks.tasks)
    return list(tasks) if isinstance(tasks, (Sequence, set, frozenset, dict)) else []


def _is_sentence_transformer(model: object) -> TypeGuard[SentenceTransformer]:
    module = sys.modules.get("sentence_transformers")  # a program with a model object has imported it
    return module is not None and isinstance(model, module.SentenceTransformer)


def _loader(model: SentenceTransformer, tasks: Iterable[AbsTask]) -> UniMELoader:
    for task in tasks:
        check_modalities(
            f"this {type(model).__name__}", [str(modality) for modality in model.modalities], task.metadata
        )
    from mteb_tasks.loader import wrap

    return wrap(model)


def _merged(first: ModelResult, second: ModelResult, tasks: Sequence[AbsTask]) -> ModelResult:
    """Both results as one, in the order of the tasks, under mteb's own name for the model."""
    order = {task.metadata.name: index for index, task in enumerate(tasks)}
    results = sorted([*first.task_results, *second.task_results], key=lambda found: order[found.task_name])
    exceptions = [*(first.exceptions or []), *(second.exceptions or [])] or None
    return first.model_copy(update={"task_results": results, "exceptions": exceptions})
