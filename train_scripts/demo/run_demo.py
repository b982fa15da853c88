"""`make demo`: trains, mines, judges, reranks and evaluates, then writes results, table and report.

This process only says what happens. Whatever needs torch is done in others, so that no memory is held twice.
"""

from __future__ import annotations

import logging
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from train_scripts.demo.jobs import Job, alone
from train_scripts.demo.results import (
    DISTILLED,
    MAIN,
    MODELS,
    REPORT,
    RERANKED,
    DemoResults,
    paired,
    render_table,
    table_rows,
)
from train_scripts.demo.seed import Seed
from train_scripts.demo.settings import DISTILLATION, JUDGE_QUALITY, PAIR_ORDERS, RERANK_TOP_K, SECOND, DemoArguments
from unime_st.files import read_json, write_json
from unime_st.memory import peak_resident
from unime_st.training import LOG

logger = logging.getLogger(__name__)


def prepare(arguments: DemoArguments, seed: int) -> None:
    """Everything that the compared models of a seed have in common, for a process of its own."""
    from train_scripts.demo.pipeline import prepare as make

    make(arguments, seed)


def _train(arguments: DemoArguments, seed: int, name: str) -> None:
    from train_scripts.demo.pipeline import train

    train(arguments, seed, name)


def _evaluate(arguments: DemoArguments, seed: int, model: str, results: Path) -> None:
    from train_scripts.demo.evaluation import evaluate

    evaluate(arguments, seed, model, results)


def _measure_distillation(arguments: DemoArguments, seed: int, results: Path) -> None:
    from train_scripts.demo.distillation import measure_distillation

    measure_distillation(arguments, seed, results)


def _report(arguments: DemoArguments) -> None:
    from train_scripts.demo.report import write_demo_report

    write_demo_report(arguments)


def _trainings(run: Seed, models: Sequence[str]) -> list[Job]:
    """Jobs that train the models to compare, the longest first."""
    a = run.arguments
    names = [name for name in models if name not in ("base", "warm", *SECOND, *RERANKED)]
    names += ["reranker"] if any(RERANKED[name].trained for name in models if name in RERANKED) else []
    others = {"in_batch_compute": a.equal_compute_steps, "stage1": a.distill_steps}
    steps = {name: others.get(name, a.steps) for name in names}
    jobs = [Job(name, partial(_train, a, run.seed, name), steps[name], run.folder / name / LOG) for name in names]
    return sorted(jobs, key=lambda job: job.name in ("in_batch", "stage1", "stage2"))


def _models(arguments: DemoArguments) -> tuple[str, ...]:
    return tuple(MODELS) if arguments.arms == "all" else MAIN


def _versions() -> dict[str, str]:
    packages = ("sentence-transformers", "transformers", "torch", "mteb", "peft", "unime-st")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    return {"python": platform.python_version(), **{name: version(name) for name in packages}, "machine": machine}


def run_demo(arguments: DemoArguments) -> Path:
    """Run the demo; whatever a killed run finished is kept.

    Args:
        arguments: Options.

    Returns:
        The report. ``results.json`` stands beside it.
    """
    output = Path(arguments.output)
    settings = keep_settings(arguments)
    rows: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    judged: list[dict[str, Any]] = []
    distilled: list[dict[str, Any]] = []
    seconds: dict[str, dict[str, float]] = {}
    peaks: list[int] = []
    for seed in range(arguments.seeds):
        found, peak = run_seed(arguments, seed, _models(arguments))
        peaks.append(peak)
        rows += [row for result in found.values() for row in result["rows"]]
        compared += paired(found, seed)
        run = Seed(arguments, seed)  # with what the other processes noted
        judged += read_json(run.folder / JUDGE_QUALITY)["rows"]
        if set(DISTILLED) <= found.keys():
            distilled += read_json(run.folder / DISTILLATION)["rows"]
        seconds[str(seed)] = run.seconds
    results = {
        "rows": rows,
        "paired": compared,
        "judge": judged,
        "distillation": distilled,
        "seconds": mean_seconds(seconds),
        "seconds_by_seed": seconds,
        "peak_rss_mb": (peak_resident() + max(peaks)) // 2**20,  # of this process and of those side by side
        "versions": _versions(),
        "settings": settings,
        "notes": _notes(arguments),
    }
    write_json(output / "results.json", results)
    alone(partial(_report, arguments))
    shown = DemoResults(results)
    logger.info(
        "\n%s\n\n%s\n\nReport: %s", render_table(table_rows(shown)), "\n".join(shown.sentences()), output / REPORT
    )
    return output / REPORT


def run_seed(arguments: DemoArguments, seed: int, models: Sequence[str]) -> tuple[dict[str, Any], int]:
    """Do what is not done yet of a seed.

    Args:
        arguments: Options.
        seed: The seed.
        models: Models to train and evaluate, as for :func:`~train_scripts.demo.evaluation.evaluate`.

    Returns:
        What evaluation wrote, by model; and the peak memory of the processes of one step, in bytes.
    """
    prepared = alone(partial(prepare, arguments, seed)).peak_memory
    run = Seed(arguments, seed)  # with what the other process noted
    second = [Job(name, partial(_train, arguments, seed, name)) for name in SECOND if name in models]
    files = {model: run.folder / "eval" / model / "results.json" for model in models}
    jobs = [Job(f"evaluate {model}", partial(_evaluate, arguments, seed, model, files[model])) for model in models]
    if set(DISTILLED) <= set(models):
        file = run.folder / DISTILLATION
        jobs.append(Job("measure stage 1", partial(_measure_distillation, arguments, seed, file)))
    steps = {
        "training": _trainings(run, models),
        "second trainings": second,
        "evaluation": jobs[::-1],  # rerankers, which take longest, first
    }
    peak = run.keep_peak(max([prepared, *(run.side_by_side(jobs, title) for title, jobs in steps.items())]))
    return {model: read_json(file) for model, file in files.items()}, peak


def mean_seconds(by_seed: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean over seeds of each stage's seconds; stages that a seed lacks, such as models of an earlier run, are left out."""
    first, *others = by_seed.values()
    shared = [name for name in first if all(name in other for other in others)]
    return {name: round(statistics.fmean(stages[name] for stages in by_seed.values()), 1) for name in shared}


def keep_settings(arguments: DemoArguments) -> dict[str, Any]:
    """Note the settings of a run in its output folder, and return them; a ValueError if it was begun with others."""
    output = Path(arguments.output)
    settings = {name: value for name, value in asdict(arguments).items() if name not in ("output", "seeds", "arms")}
    path = output / "settings.json"
    before = read_json(path) if path.is_file() else settings
    if before != settings:
        changed = ", ".join(name for name in settings if before.get(name) != settings[name])
        raise ValueError(f"{output} was begun with other settings ({changed}): choose another --output or remove it.")
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
    return settings


def _notes(arguments: DemoArguments) -> list[str]:
    size, a = arguments.eval_size, arguments
    asked = " and ".join(f"{task} {order}" for task, order in PAIR_ORDERS.items())
    return [
        f"All embedders but the untrained and the distilled one go on from the same {a.warm_steps} in-batch steps, for "
        f"{a.steps} steps of {a.batch_size} pairs of one kind, with "
        f"{'one learning rate' if a.further_learning_rate else 'a learning rate that was tuned for each of them'}.",
        f"Hard labels: in-batch InfoNCE in which {a.num_negatives} of {a.num_candidates} mined candidates of each row "
        "count as negatives of the whole batch.",
        f"Equal compute: {a.equal_compute_steps} steps, by items trained with, and those mined and judged as a third each.",
        f"The judge is unime-tiny, asked image first ({asked}). As a reranker it reorders the best {RERANK_TOP_K} by "
        f"similarity / {a.temperature:g} + log-odds.",
        "The trained reranker starts from unime-tiny and learns the judged rows, query first; as published its answers "
        "alone order the same documents.",
        f"Evaluation on scenes of the test split: {size} queries per direction in a gallery of {2 * size} near-twins, in "
        "which several documents may be right.",
    ]
