"""`make demo`: trains, mines, judges, reranks and evaluates, then writes the table and the report."""

from __future__ import annotations

import logging
import os
import platform
import statistics
from dataclasses import asdict
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mteb_tasks.loader import wrap
from mteb_tasks.run import Scores, evaluate
from mteb_tasks.two_stage import TwoStage
from unime_st.data.manifest import write_json
from unime_st.demo.settings import COMPOSITIONAL, GROUPS, DemoArguments
from unime_st.demo.side_by_side import Job, alone, peak_memory
from unime_st.demo.stages import Seed, compared_models, prepare, read_json
from unime_st.model import UniME
from unime_st.report.demo_report import render_table, write_demo_report
from unime_st.report.demo_results import MODELS, TASKS
from unime_st.reranking.model import UniMEReranker

logger = logging.getLogger(__name__)
_RERANKED = 10  # documents that the second stage gets, as in the paper


def _results(scores: Scores, model: str, seed: int) -> list[dict[str, Any]]:
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


def _results_file(run: Seed, model: str) -> Path:
    return run.folder / "eval" / model / "results.json"


def _evaluate(arguments: DemoArguments, seed: int, model: str) -> None:
    """Evaluate one model of a seed with mteb."""
    run = Seed(arguments, seed)
    path = _results_file(run, model)
    scores = evaluate(_load(run, model), _tasks(arguments.eval_size), path.parent)
    write_json(path, {"rows": _results(scores, model, seed)})


def _load(run: Seed, model: str) -> Any:
    if model == "base":
        return UniME("unime-tiny")
    if model != "v2_reranker":
        return UniME(run.path(model))
    reranker = UniMEReranker(run.path("reranker"), template="tiny")
    return TwoStage(wrap(UniME(run.path("v2"))), reranker, top_k=_RERANKED, method="pairwise", batch_size=128)


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
    settings = {name: value for name, value in asdict(arguments).items() if name not in ("output", "seeds")}
    settings["foil_size"] = arguments.eval_size // 2
    _refuse_other_settings(output, settings)
    rows, seconds, peaks = [], {}, [0]
    for seed in range(arguments.seeds):
        peaks.append(alone(partial(prepare, arguments, seed)).peak_memory)
        run = Seed(arguments, seed)
        peaks.append(run.side_by_side(compared_models(run), "training"))
        judged = [Job(f"evaluate {model}", partial(_evaluate, arguments, seed, model)) for model in reversed(MODELS)]
        peaks.append(run.side_by_side(judged, "evaluation"))
        rows += [row for model in MODELS for row in read_json(_results_file(run, model))["rows"]]
        seconds[str(seed)] = run.seconds
    stage_names = next(iter(seconds.values()))
    results = {
        "rows": rows,
        "seconds": {name: round(statistics.fmean(s[name] for s in seconds.values()), 1) for name in stage_names},
        "seconds_by_seed": seconds,
        "peak_rss_mb": (peak_memory() + max(peaks)) // 2**20,  # of this process and of those side by side
        "versions": _versions(),
        "settings": settings,
        "notes": _notes(arguments),
    }
    write_json(output / "results.json", results)
    report = write_demo_report(output)
    logger.info("\n%s\n\nReport: %s", render_table(results), report)
    return report


def _refuse_other_settings(output: Path, settings: dict[str, Any]) -> None:
    before = read_json(output / "settings.json")
    if before and before != settings:
        changed = ", ".join(name for name in settings if before.get(name) != settings[name])
        raise ValueError(f"{output} was begun with other settings ({changed}): choose another --output or remove it.")
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "settings.json", settings)


def _notes(arguments: DemoArguments) -> list[str]:
    return [
        "All models after stage 2 start from the same stage-2 weights.",
        "Every batch, the controls' too, holds one kind of query: no in-batch negative is a giveaway.",
        f"The reranker says Yes or No to each of UniME-V2's {_RERANKED} best.",
        f"Equal compute: the control takes {arguments.equal_compute_steps} steps instead of {arguments.steps}, so it "
        "encodes as many items as UniME-V2 does; mining and judging are not counted.",
        f"Evaluation: {arguments.eval_size} queries per task on scenes of the test split, which no training saw.",
    ]
