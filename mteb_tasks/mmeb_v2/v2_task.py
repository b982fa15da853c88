"""Base of the tasks of MMEB-V2: the protocol profile in metadata and results."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mteb_tasks.mmeb.base_tasks import BenchmarkTask
from mteb_tasks.mmeb_v2.profiles import current_profile, profiled

if TYPE_CHECKING:
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData


class MMEBV2Task(BenchmarkTask):
    """A task of MMEB-V2.

    The protocol is named by ``$MMEB_V2_PROFILE``. The subset name in a result carries it, so that a score of another
    protocol is never taken for this one's.
    """

    kind = "MMEB-V2 task"

    def __init__(self, **kwargs: Any) -> None:
        self.profile = current_profile()
        self.metadata = profiled(self.metadata, self.profile)
        super().__init__(**kwargs)

    def added_scores(
        self,
        tables: RetrievalSplitData,
        results: Mapping[str, Mapping[str, float]],
        scores: Mapping[str, Mapping[str, float]],
    ) -> dict[str, Any]:
        """Sizes and the protocol; see `mteb_tasks.retrieval_task.ItemRetrievalTask.added_scores`."""
        sizes = {"num_queries": len(tables["queries"]), "num_documents": len(tables["corpus"])}
        return {**super().added_scores(tables, results, scores), **sizes, **self.protocol()}

    @abstractmethod
    def protocol(self) -> dict[str, str]:
        """Profile, pixel limits and digest of the instructions, as a result states them."""
