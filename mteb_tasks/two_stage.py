"""Embed, take the top k, rerank: two models that mteb sees as one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from mteb.models import ModelMeta
from sentence_transformers import CrossEncoder

from mteb_tasks.columns import iter_items
from mteb_tasks.loader import WINDOW, UniMELoader
from unime_st.judging import Group, Judge, LocalJudge, index_token_ids

if TYPE_CHECKING:
    from datasets import Dataset
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import RetrievalOutputType

logger = logging.getLogger(__name__)


class TwoStage:
    """Retrieve with an embedder, then let a reranker order the top candidates.

    An mteb search model. Documents beyond the top k keep their place below the reranked ones. On compositional tasks
    the reranker scores caption and foil.

    Args:
        embedder: First stage, from `mteb_tasks.wrap` or the registry.
        reranker: Second stage: a `UniMEReranker` or other generative CrossEncoder, or (pairwise) any judge.
        top_k: Candidates handed to the reranker (10 in the paper).
        method: ``"listwise"`` asks once for the best of all candidates, the published protocol; ``"pairwise"`` asks
            Yes or No about each. A list cannot be longer than the tokenizer has index tokens for (9 where numbers are
            split into digits); further candidates keep their place behind it.
        batch_size: Pairs per forward pass of the second stage.
        name: ``organisation/model`` under which results are filed; None appends ``+reranker`` to the embedder's name.

    Raises:
        ValueError: If an option is wrong, or `method` is listwise and the reranker is no CrossEncoder.

    References:
        UniME-V2 (https://arxiv.org/abs/2510.13515), "UniME-V2-Reranker", inference.

    Example:
        >>> from unime_st import UniMEReranker  # doctest: +SKIP
        >>> TwoStage(wrap(model), UniMEReranker("unime-v2-reranker"))  # doctest: +SKIP
    """

    def __init__(
        self,
        embedder: UniMELoader,
        reranker: CrossEncoder | Judge,
        *,
        top_k: int = 10,
        method: Literal["listwise", "pairwise"] = "listwise",
        batch_size: int = 32,
        name: str | None = None,
    ) -> None:
        if method not in ("listwise", "pairwise"):
            raise ValueError(f"method must be 'listwise' or 'pairwise', got {method!r}")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if method == "listwise" and not hasattr(reranker, "listwise_scores"):
            raise ValueError(f"{type(reranker).__name__} cannot rank a list: use method='pairwise' or a UniMEReranker")
        self.embedder, self.method = embedder, method
        self.reranker: Any = reranker
        self.judge: Judge = cast("Judge", reranker)
        if isinstance(reranker, CrossEncoder):
            self.judge = LocalJudge(reranker, batch_size=batch_size)
        self.top_k = _longest_list(reranker, top_k) if method == "listwise" else top_k
        first = embedder.mteb_model_meta
        # Part of mteb's result key, so that other settings do not pass for these.
        settings = {"top_k": self.top_k, "method": method}
        self.mteb_model_meta: ModelMeta = first.model_copy(
            update={"name": name or f"{first.name}+reranker", "experiment_kwargs": settings}
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
            ``{query id: {document id: score}}``: cosine for documents that were not reranked; for those that were, a
            value between 2 and 4 that grows with the reranker's score, which puts them first.

        Raises:
            ValueError: If `index` was not called.
        """
        corpus, self._corpus = self._corpus, None
        if corpus is None:
            raise ValueError("call index(corpus) before search(queries)")
        found = self.embedder.search(
            queries,
            task_metadata=task_metadata,
            hf_split=hf_split,
            hf_subset=hf_subset,
            top_k=max(top_k, self.top_k),
            encode_kwargs=encode_kwargs,
            **kwargs,
        )
        rows = {document: row for row, document in enumerate(corpus["id"])}
        query_ids = iter(queries["id"])
        for window in iter_items(queries, WINDOW):
            names, groups = [], []
            for query, query_id in zip(window, query_ids):
                best = sorted(found[query_id], key=found[query_id].__getitem__, reverse=True)[: self.top_k]
                documents = [
                    item for part in iter_items(corpus.select([rows[name] for name in best])) for item in part
                ]
                names.append((query_id, best))
                groups.append(Group(query, documents))
            for (query_id, best), scores in zip(names, self._scores(groups)):
                found[query_id].update(zip(best, map(float, _above_cosine(scores))))
        return found

    def score_groups(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """Judge pairs: log-odds of Yes for each candidate of each group.

        Args:
            groups: Queries with their candidates.

        Returns:
            One float32 array for each group.
        """
        return self.judge.score(groups)

    def _scores(self, groups: list[Group]) -> list[np.ndarray]:
        if self.method == "pairwise":
            return self.score_groups(groups)
        return [self.reranker.listwise_scores(group.query, group.candidates) for group in groups]


def _above_cosine(scores: np.ndarray) -> np.ndarray:
    """Map logits into (2, 4) in float64, strictly increasing: a probability would saturate and make ties."""
    logits = np.asarray(scores, dtype=np.float64)
    return 3.0 + logits / (1.0 + np.abs(logits))


def _longest_list(reranker: Any, wanted: int) -> int:
    """How many of `wanted` candidates fit into one list of this reranker."""
    if not isinstance(reranker, CrossEncoder):
        return wanted
    for count in range(wanted, 1, -1):
        try:
            index_token_ids(reranker.tokenizer, count)
        except ValueError:
            continue
        if count < wanted:
            logger.warning("the reranker's tokenizer has index tokens for %d of %d candidates", count, wanted)
        return count
    raise ValueError("this reranker's tokenizer has no index tokens: use method='pairwise'")
