"""One seed of the demo: its folder, what is done there, and the options its trainings have in common."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train_scripts.demo.jobs import Job, side_by_side
from train_scripts.demo.settings import PURPOSE, TUNED_RATES, DemoArguments
from unime_st.files import read_json, write_json

logger = logging.getLogger(__name__)
_SECONDS, _PEAK = "seconds.json", "peak_memory.json"
TINY: dict[str, Any] = {
    "lora_rank": 0,
    "frozen": "visual",
    "item_cache": 512,
    "token_budget": 2048,
    "gradient_caching": False,
    "optim": "muon",
}
"""Options of a first training of `unime-tiny`, which learns faster with its own weights than with adapters; its vision tower
knows drawn scenes already."""


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
        """Say what happens, and keep the CPU seconds, those since the last start; gives False if it is done already."""
        if name in self.seconds:
            logger.info("[seed %d] %s: done before.", self.seed, name)
            yield False
            return
        logger.info("[seed %d] %s: %s.", self.seed, name, why)
        started = time.process_time()
        yield True
        self.keep(name, round(time.process_time() - started, 1))

    def side_by_side(self, jobs: Sequence[Job], title: str) -> int:
        """Do those of the jobs that are not done yet at the same time; gives their processes' peak memory in bytes."""
        due = [job for job in jobs if job.name not in self.seconds]
        for job in due:
            logger.info("[seed %d] %s: %s.", self.seed, job.name, PURPOSE.get(job.name, "held-out scenes, with mteb"))
        peaks = {}
        for done in side_by_side(due, f"{title} of {len(due)} models") if due else ():
            self.keep(done.name, done.seconds)
            peaks[done.process] = done.peak_memory
        return sum(peaks.values())

    def keep(self, name: str, seconds: float) -> None:
        """Note that a stage is done."""
        self.seconds[name] = seconds
        write_json(self.folder / _SECONDS, self.seconds)

    def keep_peak(self, peak: int) -> int:
        """Note the peak memory of this start in bytes; gives the highest of all starts."""
        kept = self.folder / _PEAK
        highest = max(peak, read_json(kept)["bytes"] if kept.is_file() else 0)
        write_json(kept, {"bytes": highest})
        return highest

    def options(self, name: str, start: str, data: str, steps: int) -> dict[str, Any]:
        """Options that the trainings have in common."""
        return {
            "model": start,
            "data": self.path(data),
            "output": self.path(name),
            "max_steps": steps,
            "per_device_train_batch_size": self.arguments.batch_size,
            "sub_batch_size": self.arguments.batch_size,  # one kind of query: no in-batch negative is a giveaway
            "learning_rate": self.arguments.learning_rate,
            "temperature": self.arguments.temperature,
            "logging_steps": 5,
            "save_steps": 100,
            "seed": self.seed,
            **TINY,
        }

    def compared(self, name: str, data: str, steps: int | None = None) -> dict[str, Any]:
        """The same for the models that are compared, which all go on from one."""
        options = self.options(name, self.path("warm"), data, steps or self.arguments.steps)
        rate = self.arguments.further_learning_rate or TUNED_RATES[name]
        return options | {"learning_rate": rate, "optim": "adamw_torch_fused"}
