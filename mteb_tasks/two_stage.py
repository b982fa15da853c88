"""Embed, take the top k, rerank: two models that mteb sees as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from mteb.models import ModelMeta

from mteb_tasks.columns import iter_items
from mteb_tasks.loader import WINDOW, UniMELoader
from unime_st.data.items import Item

if TYPE_CHECKING:
    from datasets import Dataset
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import RetrievalOutputType


class Reranker(Protocol):
    """What this module needs of `unime_st.reranking.UniMEReranker`."""

    def listwise_scores(self, query: Any, documents: Sequence[Any]) -> np.ndarray:
        """Score all candidates of a query in one forward: float32 ``(len(documents),)``."""
        ...

    def predict(self, inputs: Sequence[Any], **kwargs: Any) -> np.ndarray:
        """Score (query, document) pairs: ``(len(inputs),)``."""
        ...


class TwoStage:
    """Retrieve with an embedder, then let a reranker order the top candidates.

    An mteb search model. Documents beyond the top k keep their place below the reranked ones. On compositional tasks
    the reranker scores each pair.

    Args:
        embedder: First stage, from `mteb_tasks.wrap` or the registry.
        reranker: Second stage.
        top_k: Candidates handed to the reranker (10 in the paper).
        method: ``"listwise"`` (one forward over all candidates, the published protocol) or ``"pairwise"``.
        name: ``organisation/model`` under which results are filed; None appends ``+reranker`` to the embedder's name.

    Example:
        >>> from unime_st.reranking import UniMEReranker  # doctest: +SKIP
        >>> TwoStage(wrap(model), UniMEReranker("unime-v2-reranker"))  # doctest: +SKIP
    """

    def __init__(
        self,
        embedder: UniMELoader,
        reranker: Reranker,
        *,
        top_k: int = 10,
        method: Literal["listwise", "pairwise"] = "listwise",
        name: str | None = None,
    ) -> None:
        if method not in ("listwise", "pairwise"):
            raise ValueError(f"method must be 'listwise' or 'pairwise', got {method!r}")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.embedder, self.reranker = embedder, reranker
        self.top_k, self.method = top_k, method
        first = embedder.mteb_model_meta
        self.mteb_model_meta: ModelMeta = first.model_copy(
            update={"name": name or f"{first.name}+reranker", "experiment_kwargs": {"top_k": top_k, "method": method}}
        )
        self._corpus: Dataset | None = None

    def index(self, corpus: Dataset, **kwargs: Any) -> None:
        """Take the corpus of the next `search`.

        Args:
            corpus: mteb's corpus table.
            **kwargs: mteb's further arguments, passed to the embedder.
        """
        self._corpus = corpus
        self.embedder.index(corpus, **kwargs)

    def search(
        self,
        queries: Dataset,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        encode_kwargs: dict[str, Any],
        **kwargs: Any,
    ) -> RetrievalOutputType:
        """Rank the indexed corpus for each query.

        Args:
            queries: mteb's query table.
            task_metadata: The task.
            hf_split: Split of the task.
            hf_subset: Subset of the task.
            top_k: Documents to return for each query.
            encode_kwargs: ``batch_size`` and the like, for the first stage.
            **kwargs: mteb's further arguments, passed to the embedder.

        Returns:
            ``{query id: {document id: score}}``: cosine for documents that were not reranked; 2 + the reranker's
            probability for those that were, which puts them first in the reranker's order.

        Raises:
            ValueError: If `index` was not called.
        """
        if self._corpus is None:
            raise ValueError("call index(corpus) before search(queries)")
        first = self.embedder.search(
            queries,
            task_metadata=task_metadata,
            hf_split=hf_split,
            hf_subset=hf_subset,
            top_k=max(top_k, self.top_k),
            encode_kwargs=encode_kwargs,
            **kwargs,
        )
        rows = {document: row for row, document in enumerate(self._corpus["id"])}
        query_ids = iter(queries["id"])
        for window in iter_items(queries, WINDOW):
            for query, query_id in zip(window, query_ids):
                found = first[query_id]
                best = sorted(found, key=found.__getitem__, reverse=True)[: self.top_k]
                table = self._corpus.select([rows[document] for document in best])
                documents = [item for part in iter_items(table) for item in part]
                scores = self._scores(query, documents)
                found.update({document: 2.0 + float(score) for document, score in zip(best, scores)})
        self._corpus = None
        return first

    def score_pairs(self, queries: Sequence[Item], documents: Sequence[Item], *, batch_size: int = 32) -> np.ndarray:
        """Probability that each document answers its query.

        Args:
            queries: Items.
            documents: Items, one for each query.
            batch_size: Pairs whose pictures are decoded at once.

        Returns:
            float64 array ``(len(queries),)``; float64 so that saturated scores stay ordered.
        """
        scores = [
            np.asarray(
                self.reranker.predict(
                    [
                        (query.to_input(), document.to_input())
                        for query, document in zip(
                            queries[start : start + batch_size], documents[start : start + batch_size]
                        )
                    ],
                    batch_size=batch_size,
                    show_progress_bar=False,
                ),
                dtype=np.float64,
            )
            for start in range(0, len(queries), batch_size)
        ]
        return np.concatenate(scores)

    def _scores(self, query: Item, documents: list[Item]) -> np.ndarray:
        if self.method == "pairwise":
            return self.score_pairs([query] * len(documents), documents, batch_size=len(documents))
        return self.reranker.listwise_scores(query.to_input(), [document.to_input() for document in documents])
