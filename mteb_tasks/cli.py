"""``unime-mteb``: mteb's command with our tasks and models, and the score table at the end of a run."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import mteb

from mteb_tasks import published, register
from mteb_tasks.mmeb.subsets import META_TASKS
from mteb_tasks.mmeb.tasks import ALLOW_MISSING_VARIABLE, mean_scores
from mteb_tasks.preference_task import group_means

Row = tuple[str, float, float | None]
"""Name, score and published score (None = not published), both in per cent."""

_MEANS = {"mean": "overall", "ind": "IND", "ood": "OOD", **{name: name for name in META_TASKS}}


def main(arguments: list[str] | None = None) -> None:
    """Run mteb's command line with our tasks and models registered.

    ``--allow-missing`` evaluates the MMEB subsets that are there and lists the others in the result.

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
    """Wrap mteb's ``run`` command so that it ends with a table of our tasks' scores.

    Args:
        run: mteb's function.

    Returns:
        A function that does the same and then writes the table to standard output.
    """

    @functools.wraps(run)
    def run_and_show(args: argparse.Namespace) -> None:
        run(args)
        table = score_table(_scores_of_run(args), args.model)
        if table:
            sys.stdout.write(table + "\n")

    return run_and_show


def _scores_of_run(args: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores of the tasks of this project that a run was about: ``{task: {subset: scores}}``."""
    meta = mteb.get_model_meta(args.model, args.model_revision)
    cache = mteb.ResultCache(args.output_folder)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for task in _tasks_of_run(args):
        for part in getattr(task.metadata, "tasks", [task]):
            result = cache.load_task_result(part.metadata.name, meta)
            if result is not None:
                rows = [row for rows in result.scores.values() for row in rows if row["hf_subset"] in part.hf_subsets]
                found[part.metadata.name] = {str(row["hf_subset"]): dict(row) for row in rows}
    return found


def _tasks_of_run(args: argparse.Namespace) -> list[Any]:
    if args.benchmarks:
        tasks: Iterable[Any] = [task for found in mteb.get_benchmarks(names=args.benchmarks) for task in found.tasks]
    elif args.tasks:
        tasks = mteb.get_tasks(tasks=args.tasks)
    else:
        tasks = []
    return [task for task in tasks if type(task).__module__.startswith("mteb_tasks.")]


def score_table(scores: Mapping[str, Mapping[str, Mapping[str, Any]]], model: str) -> str:
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
    rows = [*_mmeb_rows(scores, model), *_other_rows(scores, model)]
    if not rows:
        return ""
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{model:<{width}}  score  published  difference", "-" * (width + 31)]
    for name, score, reference in rows:
        beside = "" if reference is None else f"  {reference:9.1f}  {round(score - reference, 1) + 0.0:+10.1f}"
        lines.append(f"{name:<{width}}  {score:5.1f}{beside}")
    return "\n".join(lines)


def _mmeb_rows(scores: Mapping[str, Mapping[str, Mapping[str, Any]]], model: str) -> list[Row]:
    tasks = {
        name.removeprefix("MMEB-"): 100 * float(next(iter(found.values()))["main_score"])
        for name, found in scores.items()
        if name.startswith("MMEB-") and found
    }
    known = published.MMEB_TASKS.get(model, {})
    rows: list[Row] = [(f"MMEB-{name}", score, known.get(name)) for name, score in tasks.items()]
    if len(tasks) < 2:
        return rows
    # Published means are over all subsets: beside means over a part they would mislead.
    reference = published.MMEB.get(model, {}) if len(tasks) == 36 else {}
    means = mean_scores(tasks)
    label = "MMEB" if len(tasks) == 36 else f"MMEB ({len(tasks)} of 36)"
    order = [*META_TASKS, "ind", "ood", "mean"]
    return rows + [(f"{label} {_MEANS[name]}", means[name], reference.get(name)) for name in order if name in means]


def _other_rows(scores: Mapping[str, Mapping[str, Mapping[str, Any]]], model: str) -> list[Row]:
    rows: list[Row] = []
    for task, found in scores.items():
        if task.startswith("MMEB-") or not found:
            continue
        subsets = {name: 100 * float(row["main_score"]) for name, row in found.items()}
        groups = group_means(subsets)
        if groups:
            rows += [(f"{task} {name}", score, None) for name, score in subsets.items()]
            known = published.COMPOSITION.get(model, {}) if task.startswith("SugarCrepe") else {}
            rows += [(f"{task} {name}", score, known.get(name)) for name, score in groups.items()]
        elif len(subsets) == 1:
            reference = published.CAPTIONS.get(model, {}).get(task)
            rows.append((task, next(iter(subsets.values())), reference))
        else:
            rows += [(f"{task} {name}", score, None) for name, score in subsets.items()]
    return rows
