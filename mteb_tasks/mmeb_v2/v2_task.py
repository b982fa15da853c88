"""Base of the tasks of MMEB-V2: the protocol profile in metadata and results."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from mteb_tasks.mmeb.base_tasks import BenchmarkTask
from mteb_tasks.mmeb_v2.profiles import current_profile, profiled
from mteb_tasks.retrieval_task import ScoredSplit


class MMEBV2Task(BenchmarkTask):
    """A task of MMEB-V2.

    The protocol is named by ``$MMEB_V2_PROFILE``. The subset name in a result carries it, so that a score of another
    protocol is never taken for this one's.
    """

    kind = "MMEB-V2 task"

    def __init__(self, **kwargs: object) -> None:
        self.profile = current_profile()
        self.metadata = profiled(self.metadata, self.profile)
        super().__init__(**kwargs)

    def added_scores(self, split: ScoredSplit) -> dict[str, Any]:
        """Sizes and the protocol; see `mteb_tasks.retrieval_task.ItemRetrievalTask.added_scores`."""
        sizes = {"num_queries": len(split.tables["queries"]), "num_documents": len(split.tables["corpus"])}
        return {**super().added_scores(split), **sizes, **self.protocol()}

    @abstractmethod
    def protocol(self) -> dict[str, str]:
        """Profile, pixel limits and digest of the instructions, as a result states them."""
