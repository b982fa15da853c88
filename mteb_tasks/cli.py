"""``unime-mteb``: mteb's command with our tasks and models, and the score table at the end of a run."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import mteb
from mteb.models import ModelMeta
from mteb.results import TaskResult

from mteb_tasks import register
from mteb_tasks.mmeb.subsets import BENCHMARK
from mteb_tasks.mmeb.tasks import ALLOW_MISSING_VARIABLE, MMEB_TASKS, checked_together, wanted
from mteb_tasks.models import check_variables
from mteb_tasks.registration import registered_tasks
from mteb_tasks.scores import Scores, score_table

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> None:
    """Run mteb's command line with our tasks and models registered.

    ``--allow-missing`` evaluates the MMEB subsets that are there; the result of ``MMEB`` lists the others.

    Args:
        arguments: Command line; None takes the one of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--allow-missing" in arguments:
        os.environ[ALLOW_MISSING_VARIABLE] = "1"
    register()
    from mteb.cli import main as mteb_main

    sys.argv = ["unime-mteb", *(argument for argument in arguments if argument != "--allow-missing")]
    mteb_main()


def with_scores(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """Wrap mteb's ``run`` command so that it ends with a table of our tasks' scores and what reranking took.

    Unless ``--prediction-folder`` says otherwise, what our tasks found for each query is kept in ``predictions/`` beside
    mteb's ``results/``, where ``unime report`` looks for it.

    Args:
        run: mteb's function.

    Returns:
        A function that does the same and then writes the table to standard output.
    """

    @functools.wraps(run)
    def run_and_show(args: argparse.Namespace) -> None:
        # mteb's levels; what a task will take is told on that of its own "running task ...".
        levels = (logging.CRITICAL, logging.WARNING, logging.INFO)
        logging.getLogger("mteb_tasks").setLevel(levels[args.verbosity] if args.verbosity < 3 else logging.DEBUG)
        check_variables(args.model)
        if args.prediction_folder is None and not args.save_predictions and _is_about_us(args):
            args.prediction_folder = _prediction_folder(args)
        args.tasks = _without_missing(args.tasks)
        with checked_together(args.tasks or ()):
            run(args)
        table = score_table(_scores_of_run(args), args.model.removeprefix("unime/"))
        if table:
            sys.stdout.write(table + "\n" + _costs())

    return run_and_show


def _costs() -> str:
    """What the second stage took in this process; nothing where all results were there already."""
    module = sys.modules.get("mteb_tasks.two_stage")  # it imports torch: only a run with two stages has it
    costs = module.COSTS.items() if module else ()
    return "".join(f"{task}: reranking took, per query, {cost}\n" for task, cost in costs)


def _without_missing(names: list[str] | None) -> list[str] | None:
    """Tasks of a run without the MMEB subsets that are missing, where that is allowed."""
    asked = [task for task in MMEB_TASKS if task.metadata.name in (names or ())]
    left_out = {task.metadata.name for task in asked} - {task.metadata.name for task in wanted(asked)}
    if names is None or not left_out:
        return names
    logger.warning("left out, because there are no data of them: %s", ", ".join(sorted(left_out)))
    return [name for name in names if name not in left_out]


def _is_about_us(args: argparse.Namespace) -> bool:
    if args.benchmarks:
        return BENCHMARK in args.benchmarks
    return any(name == task.metadata.name for task in registered_tasks() for name in args.tasks or ())


def _prediction_folder(args: argparse.Namespace) -> str:
    meta = mteb.get_model_meta(args.model, args.model_revision)
    names = [str(meta.name).replace("/", "__"), meta.revision or "no_revision_available"]
    folder = mteb.ResultCache(args.output_folder).cache_path.joinpath("predictions", *names)
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def _scores_of_run(args: argparse.Namespace) -> Scores:
    """Scores of the tasks of this project that a run was about: ``{task: {subset: scores}}``."""
    meta = mteb.get_model_meta(args.model, args.model_revision)
    cache = mteb.ResultCache(args.output_folder)
    found: Scores = {}
    for task in _tasks_of_run(args):
        for part in getattr(task.metadata, "tasks", [task]):
            result = _load(cache, part.metadata.name, meta)
            if result is not None:
                rows = [row for rows in result.scores.values() for row in rows if row["hf_subset"] in part.hf_subsets]
                found[part.metadata.name] = {str(row["hf_subset"]): dict(row) for row in rows}
    return found


def _load(cache: mteb.ResultCache, task: str, meta: ModelMeta) -> TaskResult | None:
    """Result of a task; of a model with settings of its own (two stages), the one that was written last."""
    plain = cache.get_task_result_path(task, meta)
    found = [path for path in (plain, *plain.parent.glob(f"experiments/*/{task}.json")) if path.is_file()]
    return TaskResult.from_disk(max(found, key=lambda path: path.stat().st_mtime)) if found else None


def _tasks_of_run(args: argparse.Namespace) -> list[Any]:
    if args.benchmarks:
        tasks: Iterable[Any] = [task for found in mteb.get_benchmarks(names=args.benchmarks) for task in found.tasks]
    elif args.tasks:
        tasks = mteb.get_tasks(tasks=args.tasks)
    else:
        tasks = []
    return [task for task in tasks if type(task).__module__.startswith("mteb_tasks.")]
