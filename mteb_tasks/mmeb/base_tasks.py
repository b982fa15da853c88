"""Base of the tasks of MMEB and MMEB-V2 and of their aggregates: local data, preflight of a whole run, missing tasks."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from mteb.abstasks.aggregated_task import AbsTaskAggregate

from mteb_tasks.local_data import LOCAL_PREFIX, with_digest
from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.retrieval_task import ItemRetrievalTask
from unime_st.files import digest

if TYPE_CHECKING:
    from mteb.results import TaskResult
    from mteb.types import ScoresDict

logger = logging.getLogger(__name__)

ALLOW_MISSING_VARIABLE = "MMEB_ALLOW_MISSING"

_PASSED: set[tuple[str, str]] = set()
"""Task name and data digest of what was checked in this process."""


class BenchmarkTask(ItemRetrievalTask):
    """A task of MMEB or MMEB-V2.

    For data in a local folder the subset name in a result carries their digest, so that a score of other data is never
    taken for this one's.
    """

    follows_environment = True
    key: ClassVar[str]
    """Name on the leaderboard."""
    kind: ClassVar[str]
    """What a message calls such a task."""
    run: Sequence[BenchmarkTask] = ()
    """Tasks of the same run, whose data are checked before the first one is encoded; this one alone if empty."""
    checked = ""
    """Digest of the data that were checked with those of the run."""

    def __init__(self, **kwargs: object) -> None:
        root = self.local_root()
        if root is not None:
            self.metadata = with_digest(self.metadata, self.data_digest(root))
        super().__init__(**kwargs)

    @abstractmethod
    def local_root(self) -> Path | None:
        """Local folder of the data; None where they come from the hub. It may not exist."""

    @abstractmethod
    def hub_root(self, run: Sequence[BenchmarkTask]) -> Path:
        """Fetch the data from the hub.

        Args:
            run: Tasks of the run.

        Returns:
            The snapshot in the cache, whose name is its commit.
        """

    @abstractmethod
    def data_digest(self, root: Path) -> str:
        """12 hexadecimal digits over the data in a folder; ``"missing"`` where there are none."""

    @abstractmethod
    def is_missing(self, root: Path) -> bool:
        """Whether a folder lacks the tables of this task."""

    @abstractmethod
    def check_data(self, root: Path) -> str:
        """Check the data in a folder.

        Returns:
            A line about them.

        Raises:
            MMEBDataError: If they are missing or faulty; the message names the file and the row.
        """

    def checked_root(self) -> Path:
        """Check the data of all tasks of the run and return the folder of this one.

        Raises:
            MMEBDataError: If data are missing or faulty, or not those that this object was made for.
        """
        run, root = self.run or (self,), self.local_root()
        if root is None:
            root = self.hub_root(run)
            dataset = {**self.metadata.dataset, "revision": root.name}
            self.metadata = self.metadata.model_copy(update={"dataset": dataset})
            return root
        own = self.data_digest(root)
        if self.metadata.revision != f"{LOCAL_PREFIX}{own}":
            raise MMEBDataError(f"{root} is not the folder this task was made for, or has changed: make the task anew")
        if self.checked != own:
            preflight({task: found for task in run if (found := task.local_root()) is not None})
        return root


def preflight(roots: Mapping[BenchmarkTask, Path]) -> list[str]:
    """Check the data of several tasks; what was checked in this process and has not changed is skipped.

    Args:
        roots: Folder of the data by task.

    Returns:
        A line about each task that was checked now.

    Raises:
        MMEBDataError: Lists the first fault of each faulty task.
    """
    lines, faults = [], []
    for task, root in roots.items():
        state = (task.metadata.name, task.data_digest(root))
        try:
            if state not in _PASSED:
                lines.append(task.check_data(root))
                _PASSED.add(state)
            task.checked = state[1]
        except MMEBDataError as error:
            faults.append(str(error))
    if faults:
        missing = sum(task.is_missing(root) for task, root in roots.items())
        hint = f" (set {ALLOW_MISSING_VARIABLE}=1 to leave missing ones out)" if 0 < missing < len(roots) else ""
        count = f"{len(faults)} {next(iter(roots)).kind}{'' if len(faults) == 1 else 's'}"
        raise MMEBDataError(f"{count} cannot be evaluated{hint}:\n" + "\n".join(faults))
    for line in lines:
        logger.info("%s", line)
    return lines


@contextmanager
def checked_together(tasks: Iterable[object]) -> Iterator[None]:
    """Check the data of all tasks of an evaluation before the first one is encoded.

    Args:
        tasks: Task objects; those that are part of a run keep it.
    """
    alone = [task for task in tasks if isinstance(task, BenchmarkTask) and not task.run]
    for task in alone:
        task.run = alone
    try:
        yield
    finally:
        for task in alone:
            task.run = ()


Task = TypeVar("Task", bound=BenchmarkTask)


def run_of(classes: Sequence[type[Task]]) -> list[Task]:
    """Make one task object for each task of a benchmark that shall be evaluated; their data are checked together.

    Args:
        classes: All tasks of the benchmark.

    Returns:
        All of them, or, with ``MMEB_ALLOW_MISSING=1`` and local folders, those whose tables are there. With nothing
        there all of them, and the run reports it.
    """
    tasks = [made() for made in classes]
    left_out = _missing(tasks)
    tasks = [task for task in tasks if task.metadata.name not in left_out]
    for task in tasks:
        task.run = tasks
    return tasks


def missing_tasks(classes: Collection[type[BenchmarkTask]]) -> set[str]:
    """Names of the tasks that are left out because there are no data of them, where that is allowed.

    Args:
        classes: Tasks that were asked for.

    Returns:
        Nothing where all of them are missing: the run shall say so.
    """
    return _missing(made() for made in classes)


def _missing(tasks: Iterable[BenchmarkTask]) -> set[str]:
    if os.environ.get(ALLOW_MISSING_VARIABLE, "").lower() not in ("1", "true", "yes"):
        return set()  # tasks are not made: that reads their data
    tasks = list(tasks)
    roots = {task: root for task in tasks if (root := task.local_root()) is not None}
    missing = {task.metadata.name for task, root in roots.items() if task.is_missing(root)}
    return missing if len(missing) < len(tasks) else set()


class BenchmarkAggregate(AbsTaskAggregate):
    """All tasks of MMEB or of MMEB-V2."""

    follows_environment = True
    classes: ClassVar[Sequence[type[BenchmarkTask]]]
    """All task classes."""
    keys: ClassVar[Sequence[str]]
    """Names of all tasks on the leaderboard."""

    def __init__(self, **kwargs: object) -> None:
        tasks = run_of(self.classes)
        self.metadata = self.metadata.model_copy(update={"tasks": tasks})
        if any(task.local_root() is not None for task in tasks):
            self.metadata = with_digest(self.metadata, digest(*(task.metadata.revision for task in tasks), length=12))
        super().__init__(**kwargs)

    def task_results_to_scores(self, task_results: list[TaskResult]) -> dict[str, ScoresDict]:
        """Average the results of the tasks.

        Args:
            task_results: One result for each task.

        Returns:
            ``{"test": {subset name: scores}}`` with the means, the number of tasks and the leaderboard names of those
            left out.
        """
        made = {task.metadata.name: task for task in self.tasks if isinstance(task, BenchmarkTask)}
        score_of = {
            made[result.task_name].key: _score(result, made[result.task_name])
            for result in task_results
            if result.task_name in made
        }
        left_out = [key for key in self.keys if key not in score_of]
        facts = {"num_tasks": len(score_of), "left_out": left_out}
        return {"test": {self.hf_subsets[0]: {**self.means(score_of), **facts}}}

    @abstractmethod
    def means(self, score_of: Mapping[str, float]) -> dict[str, object]:
        """Means of the benchmark.

        Args:
            score_of: Score by name on the leaderboard.

        Returns:
            Scores as they stand in the result, ``main_score`` among them.
        """


def _score(result: TaskResult, task: BenchmarkTask) -> float:
    """Score on the data at hand: a result holds those of other data and protocols, too."""
    rows = [row for row in result.scores["test"] if row["hf_subset"] in task.hf_subsets]
    return float((rows or result.scores["test"])[-1]["main_score"])
