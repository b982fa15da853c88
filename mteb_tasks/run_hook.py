"""Hook around the ``mteb run`` command: missing MMEB tasks are left out before it, table of scores after it.

What a run does with tasks and models of others is left as it is.
"""

from __future__ import annotations

import argparse
import functools
import logging
import signal
import sys
from collections.abc import Callable

from mteb_tasks.mmeb.base_tasks import missing_tasks
from mteb_tasks.mmeb.tasks import MMEB_TASKS
from mteb_tasks.mmeb_v2.aggregate import MMEB_V2_TASKS
from mteb_tasks.mmeb_v2.leaderboard import AGGREGATE, BENCHMARK
from mteb_tasks.mmeb_v2.profiles import current_profile
from mteb_tasks.models import check_variables
from mteb_tasks.run_context import CurrentRun, new_run
from mteb_tasks.scores import Scores, score_table
from unime_st.memory import leave_quickly

logger = logging.getLogger(__name__)

_LOG_LEVELS = {0: logging.CRITICAL, 1: logging.WARNING, 2: logging.INFO, 3: logging.DEBUG}

RunCommand = Callable[[argparse.Namespace], None]


def with_scores(run: RunCommand) -> RunCommand:
    """Wrap mteb's ``run`` command so that it ends with a table of our tasks' scores and what reranking took.

    Unless ``--prediction-folder`` says otherwise, what our tasks found for each query is kept in ``predictions/`` beside
    mteb's ``results/``, where ``unime report`` looks for it.

    Args:
        run: mteb's function.

    Returns:
        A function that does the same and, if tasks of this package were among those of the run, writes the table to
        standard output. An error in the table is logged: the evaluation is done and its results are written.
    """

    @functools.wraps(run)
    def run_and_show(args: argparse.Namespace) -> None:
        if args.verbosity in _LOG_LEVELS:
            logging.getLogger("mteb_tasks").setLevel(_LOG_LEVELS[args.verbosity])
        if args.model is not None:
            check_variables(args.model)
        if BENCHMARK in (args.benchmarks or ()) or any(name.startswith(AGGREGATE) for name in args.tasks or ()):
            current_profile()  # of an unknown one mteb would say that the task was not found
        args.tasks = _without_missing(args.tasks)
        with new_run(args.output_folder) as current:
            try:
                run(args)
            except KeyboardInterrupt:
                leave_quickly(-signal.SIGINT)  # as Python itself, after the traceback
                raise
        if current.tasks:
            try:
                _show(current, args.model.removeprefix("unime/"))
            except (OSError, ValueError, LookupError, TypeError):  # damaged or foreign result files, closed output
                logger.warning("the table of scores could not be made; the results are written", exc_info=True)

    return run_and_show


def _show(run: CurrentRun, model: str) -> None:
    table = score_table(_scores(run), model)
    if table:
        sys.stdout.write(table + "\n" + _costs())


def _costs() -> str:
    """What the second stage took in this process; nothing where all results were there already."""
    module = sys.modules.get("mteb_tasks.two_stage")  # it imports torch: only a run with two stages has it
    costs = module.COSTS.items() if module else ()
    return "".join(f"{task}: reranking took, per query, {cost}\n" for task, cost in costs)


def _without_missing(names: list[str] | None) -> list[str] | None:
    """Tasks of a run without those of MMEB and MMEB-V2 that are missing, where that is allowed."""
    left_out: set[str] = set()
    for classes in (MMEB_TASKS, MMEB_V2_TASKS):
        left_out |= missing_tasks([task for task in classes if task.metadata.name in (names or ())])
    if names is None or not left_out:
        return names
    logger.warning("left out, because there are no data of them: %s", ", ".join(sorted(left_out)))
    return [name for name in names if name not in left_out]


def _scores(run: CurrentRun) -> Scores:
    """Read what mteb wrote for the tasks of a run and for the parts of its aggregates."""
    scores: Scores = {}
    for task in run.tasks:
        for part in getattr(task.metadata, "tasks", [task]):
            name = part.metadata.name
            result = run.cache.load_task_result(name, run.model_meta) if run.model_meta else None
            if result is not None:
                rows = [row for rows in result.scores.values() for row in rows if row["hf_subset"] in part.hf_subsets]
                scores[name] = {str(row["hf_subset"]): dict(row) for row in rows}
    return scores
