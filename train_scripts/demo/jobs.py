"""Independent jobs at the same time, one thread each: a model this small gains next to nothing from a second thread."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unime_st.memory import peak_resident
from unime_st.stages.command import set_up_logging


@dataclass(frozen=True)
class Job:
    """A piece of work for a process of its own.

    Args:
        name: Its name.
        work: What to do; it has to be picklable.
        size: How much it is beside the other jobs, in steps.
        log: Training log in which the steps already done can be read; None if there is none.
    """

    name: str
    work: Callable[[], object]
    size: int = 1
    log: Path | None = None

    @property
    def done(self) -> int:
        """Steps that the log shows."""
        if self.log is None or not self.log.is_file():
            return 0
        lines = self.log.read_text(encoding="utf-8").splitlines()
        return min(self.size, max((_step(line) for line in lines[-2:]), default=0))


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # the last line may be half written
        return 0


@dataclass(frozen=True)
class Done:
    """A finished job: its name, its CPU seconds, and the peak memory of its process so far in bytes."""

    name: str
    seconds: float
    process: int
    peak_memory: int


_PROCESSES = 2  # at once, however many cores there are: torch and its friends take a gigabyte in each
_CONTEXT = multiprocessing.get_context("forkserver")  # one process imports the libraries, the others are forks of it
_CONTEXT.set_forkserver_preload(["unime_st.stages", "mteb_tasks.in_process", "mteb_tasks.scenes"])


def _start(quiet: bool) -> None:
    """Make a process ready, with visible bars if it is alone."""
    import torch

    torch.set_num_threads(1)  # a second one brings a tenth, and on a busy machine makes it several times slower
    if quiet:  # one bar tells it all
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign,assignment]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where the trainer prints its log if it may not show a bar
        logging.getLogger().setLevel(logging.WARNING)
    else:
        set_up_logging()
    parent: Any = multiprocessing.parent_process()

    def end_with_the_parent() -> None:
        parent.join()
        os._exit(1)  # a killed run that is started again must not find somebody still writing

    threading.Thread(target=end_with_the_parent, daemon=True).start()


def _run(job: Job) -> Done:
    started = time.process_time()  # one thread: on a quiet core that is the time that passes
    job.work()
    return Done(job.name, round(time.process_time() - started, 1), os.getpid(), peak_resident())


def _pool(workers: int, *, quiet: bool) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, _CONTEXT, initializer=_start, initargs=(quiet,))


def alone(work: Callable[[], object]) -> Done:
    """Do something in a process of its own, so that its memory is given back when it ends.

    Args:
        work: What to do; it has to be picklable.

    Returns:
        Done: Its CPU seconds and peak memory.
    """
    with _pool(1, quiet=False) as pool:
        return pool.submit(_run, Job("alone", work)).result()


def side_by_side(jobs: Sequence[Job], title: str) -> Iterator[Done]:
    """Run jobs in two processes, or in one if there is one core, the first of the list first.

    Args:
        jobs: What to do.
        title: What the progress bar says.

    Yields:
        Each job as it ends.

    Raises:
        Exception: What a job raised; jobs that have not begun are dropped then.
    """
    workers = min(len(jobs), os.cpu_count() or 1, _PROCESSES)
    bar = tqdm(total=sum(job.size for job in jobs), desc=title, unit="step", disable=False)
    pool = _pool(workers, quiet=True)
    try:
        running: dict[Future[Done], Job] = {pool.submit(_run, job): job for job in jobs}
        finished = 0
        while running:
            ended, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in ended:
                finished += running.pop(future).size
                yield future.result()
            bar.update(finished + sum(job.done for job in running.values()) - bar.n)
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
