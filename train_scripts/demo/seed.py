"""One seed of the demo: its folder, what is done there, and the options its trainings have in common."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train_scripts.demo.jobs import Job, side_by_side
from train_scripts.demo.settings import PURPOSE, DemoArguments
from unime_st.files import read_json, write_json

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
        kept = self.folder / _SECONDS
        self.seconds: dict[str, float] = read_json(kept) if kept.is_file() else {}

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
            "per_device_train_batch_size": self.arguments.batch_size,
            "learning_rate": self.arguments.learning_rate,
            "logging_steps": 5,
            "save_steps": 100,
            "seed": self.seed,
            **_LORA,
        }

    def further(self, name: str, data: str, steps: int) -> dict[str, Any]:
        """The same for what starts from stage 2: at its rate, further training would first undo what it learnt."""
        common = self.common(name, self.path("stage2"), data, steps)
        return common | {"learning_rate": self.arguments.further_learning_rate}
