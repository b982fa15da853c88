"""`make demo`: trains, mines, judges, reranks and evaluates, then writes the table and the report.

This process only says what happens. Whatever needs torch is done in others, so that no memory is held twice.
"""

from __future__ import annotations

import logging
import os
import platform
import statistics
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from train_scripts.demo.jobs import Job, alone
from train_scripts.demo.results import EVERYTHING, MODELS, REPORT, render_table
from train_scripts.demo.seed import Seed
from train_scripts.demo.settings import FUSED, RERANKED, DemoArguments
from unime_st.files import read_json, write_json
from unime_st.memory import peak_resident
from unime_st.training import LOG

logger = logging.getLogger(__name__)


def _prepare(arguments: DemoArguments, seed: int) -> None:
    from train_scripts.demo.pipeline import prepare

    prepare(arguments, seed)


def _train(arguments: DemoArguments, seed: int, name: str) -> None:
    from train_scripts.demo.pipeline import train

    train(arguments, seed, name)


def _evaluate(arguments: DemoArguments, seed: int, model: str, results: Path) -> None:
    from train_scripts.demo.evaluation import evaluate

    evaluate(arguments, seed, model, results)


def _report(output: Path) -> None:
    from train_scripts.demo.report import write_demo_report

    write_demo_report(output)


def _trainings(run: Seed) -> list[Job]:
    """Jobs that train the models to compare, the longest first."""
    a = run.arguments
    steps = {"in_batch_compute": a.equal_compute_steps, "v2": a.steps, "in_batch": a.steps}
    steps["v2_reranker"] = a.reranker_steps
    folders = {name: run.folder / name for name in steps} | {"v2_reranker": run.folder / "reranker"}
    return [Job(name, partial(_train, a, run.seed, name), steps[name], folders[name] / LOG) for name in steps]


def _evaluations(run: Seed) -> dict[str, Path]:
    """Where the results of each model are."""
    models = [model for model in MODELS if model != EVERYTHING or run.arguments.arms == "all"]
    return {model: run.folder / "eval" / model / "results.json" for model in models}


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
    settings = {name: value for name, value in asdict(arguments).items() if name not in ("output", "seeds", "arms")}
    settings["foil_size"] = arguments.eval_size // 2
    _refuse_other_settings(output, settings)
    rows, seconds, peaks = [], {}, []
    for seed in range(arguments.seeds):
        run = Seed(arguments, seed)
        peaks.append(alone(partial(_prepare, arguments, seed)).peak_memory)
        run = Seed(arguments, seed)  # with what the other process noted
        peaks.append(run.side_by_side(_trainings(run), "training"))
        if arguments.arms == "all":
            peaks.append(run.side_by_side([Job("soup", partial(_train, arguments, seed, "soup"))], "merging"))
        files = _evaluations(run)
        jobs = [Job(f"evaluate {model}", partial(_evaluate, arguments, seed, model, files[model])) for model in files]
        peaks.append(run.side_by_side(jobs[::-1], "evaluation"))
        rows += [row for file in files.values() for row in read_json(file)["rows"]]
        seconds[str(seed)] = run.seconds
    stage_names = next(iter(seconds.values()))
    results = {
        "rows": rows,
        "seconds": {name: round(statistics.fmean(s[name] for s in seconds.values()), 1) for name in stage_names},
        "seconds_by_seed": seconds,
        "peak_rss_mb": (peak_resident() + max(peaks)) // 2**20,  # of this process and of those side by side
        "versions": _versions(),
        "settings": settings,
        "notes": _notes(arguments),
    }
    write_json(output / "results.json", results)
    alone(partial(_report, output))
    logger.info("\n%s\n\nReport: %s", render_table(results), output / REPORT)
    return output / REPORT


def _refuse_other_settings(output: Path, settings: dict[str, Any]) -> None:
    path = output / "settings.json"
    before = read_json(path) if path.is_file() else settings
    if before != settings:
        changed = ", ".join(name for name in settings if before.get(name) != settings[name])
        raise ValueError(f"{output} was begun with other settings ({changed}): choose another --output or remove it.")
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def _notes(arguments: DemoArguments) -> list[str]:
    everything = [
        "Everything we know: the weights of UniME-V2 and of the equal-steps control, averaged; then the shipped judge, "
        f"asked both ways round about the {FUSED} best, its log-odds added to similarity / {arguments.temperature:g}. "
        f"It is trained for {arguments.steps} steps more than UniME-V2, and judges each query."
    ]
    return [
        "All models after stage 2 start from the same stage-2 weights.",
        "Every batch, the controls' too, holds one kind of query: no in-batch negative is a giveaway.",
        f"The reranker says Yes or No to each of UniME-V2's {RERANKED} best.",
        *(everything if arguments.arms == "all" else ()),
        f"Equal compute: the control takes {arguments.equal_compute_steps} steps instead of {arguments.steps}, so it "
        "encodes as many items as UniME-V2 does; mining and judging are not counted.",
        f"Evaluation: {arguments.eval_size} queries per task on scenes of the test split, which no training saw.",
    ]
