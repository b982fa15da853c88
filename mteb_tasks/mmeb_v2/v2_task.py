"""Base of the tasks of MMEB-V2: protocol profile, local data, and the check of all data of a run."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mteb_tasks.local_data import LOCAL_PREFIX
from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.mmeb.tasks import ALLOW_MISSING_VARIABLE
from mteb_tasks.mmeb_v2.profiles import current_profile, profiled
from mteb_tasks.retrieval_task import ItemRetrievalTask
from mteb_tasks.run_context import current_run

logger = logging.getLogger(__name__)

_PASSED: set[tuple[str, str]] = set()
"""Leaderboard key and data digest of what was checked in this process."""


class MMEBV2Task(ItemRetrievalTask):
    """A task of MMEB-V2.

    The protocol is named by ``$MMEB_V2_PROFILE``. The subset name in a result carries it and, for data in a local
    folder, their digest, so that a score of another protocol or of other data is never taken for this one's.
    """

    key: ClassVar[str]
    """Name on the leaderboard."""
    run: Sequence[MMEBV2Task] = ()
    """Tasks of the same run, whose data are checked before the first one is encoded; this one alone if empty."""

    def __init__(self, **kwargs: Any) -> None:
        self.profile = current_profile()
        revision = None if self.local_root() is None else self.data_digest()
        self.metadata = profiled(self.metadata, self.profile, revision)
        super().__init__(**kwargs)

    @abstractmethod
    def local_root(self) -> Path | None:
        """Local folder of the data; None where they come from the hub."""

    @abstractmethod
    def data_digest(self) -> str:
        """12 hexadecimal digits over the local data; ``"missing"`` where there are none."""

    @abstractmethod
    def is_missing(self) -> bool:
        """Whether there is no table of this task in the local folder."""

    @abstractmethod
    def check_data(self) -> str:
        """Check the local data.

        Returns:
            A line about them.

        Raises:
            MMEBDataError: If they are missing or faulty; the message names the file and the row.
        """

    def checked_root(self) -> Path | None:
        """Check the data of all tasks of the run and return the local folder of this one, None for the hub.

        Raises:
            MMEBDataError: If data are missing or faulty, or not those that this object was made for.
        """
        root = self.local_root()
        if root is not None:
            if self.metadata.revision != f"{LOCAL_PREFIX}{self.data_digest()}":
                raise MMEBDataError(f"{root} is not the folder this task was made for, or has changed: make it anew")
            preflight(self.run or self._run_of_command() or (self,))
        return root

    def _run_of_command(self) -> list[MMEBV2Task]:
        """Tasks of the ``mteb run`` command in progress that this one belongs to."""
        run = current_run()
        listed = [] if run is None else [part for task in run.tasks for part in getattr(task, "tasks", [task])]
        return [task for task in listed if isinstance(task, MMEBV2Task)] if self in listed else []

    def task_specific_scores(
        self,
        scores: Mapping[str, Mapping[str, float]],
        qrels: Mapping[str, Mapping[str, int]],
        results: Mapping[str, Mapping[str, float]],
        hf_split: str,
        hf_subset: str,
    ) -> dict[str, Any]:
        """Add sizes and the protocol to the scores; see `ItemRetrievalTask.task_specific_scores`."""
        found: dict[str, Any] = super().task_specific_scores(scores, qrels, results, hf_split, hf_subset)
        documents = len(self.dataset[hf_subset][hf_split]["corpus"])
        return {**found, "num_queries": len(qrels), "num_documents": documents, **self.protocol()}

    @abstractmethod
    def protocol(self) -> dict[str, str]:
        """Profile, pixel limits and digest of the instructions, as a result states them."""


def preflight(tasks: Sequence[MMEBV2Task]) -> list[str]:
    """Check the local data of several tasks; what was checked in this process and has not changed is skipped.

    Args:
        tasks: Tasks on local data.

    Returns:
        A line about each task that was checked now.

    Raises:
        MMEBDataError: Lists the first fault of each faulty task.
    """
    lines, faults = [], []
    for task in tasks:
        state = (task.key, task.data_digest())
        if state in _PASSED:
            continue
        try:
            lines.append(task.check_data())
            _PASSED.add(state)
        except MMEBDataError as error:
            faults.append(str(error))
    if faults:
        missing = sum(task.is_missing() for task in tasks)
        hint = f" (set {ALLOW_MISSING_VARIABLE}=1 to leave missing tasks out)" if 0 < missing < len(tasks) else ""
        count = "1 task" if len(faults) == 1 else f"{len(faults)} tasks"
        raise MMEBDataError(f"{count} of MMEB-V2 cannot be evaluated{hint}:\n" + "\n".join(faults))
    for line in lines:
        logger.info("%s", line)
    return lines
