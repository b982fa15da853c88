"""Embed, take the top k, rerank: two models that mteb sees as one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from mteb.models import ModelMeta
from sentence_transformers import CrossEncoder

from mteb_tasks.columns import iter_items
from mteb_tasks.embedding_estimate import timed_sample
from mteb_tasks.loader import WINDOW, UniMELoader
from unime_st.judging import Group, Judge, LocalJudge
from unime_st.losses.list_answers import longest_list
from unime_st.reranking.unime_reranker import UniMEReranker
from unime_st.scoring.forward_counter import ForwardCount, ForwardCounter

if TYPE_CHECKING:
    from datasets import Dataset
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import RetrievalOutputType

logger = logging.getLogger(__name__)

SAMPLE = 4
"""Queries that are reranked to find out how long all will take."""

COSTS: dict[str, ForwardCount] = {}
"""What reranking took per query in each retrieval task of this process, for the end of ``mteb run``."""


class TwoStage:
    """Retrieve with an embedder, then let a reranker order the top candidates.

    An mteb search model. Documents beyond the top k keep their place below the reranked ones. On compositional tasks
    the reranker scores caption and foil.

    Args:
        embedder: First stage, from `mteb_tasks.wrap` or the registry.
        reranker: Second stage: a `UniMEReranker` or other generative CrossEncoder, or (pairwise) any judge.
        top_k: Candidates handed to the reranker (10 in the paper).
        method: ``"listwise"`` asks once for the best of all candidates, the published protocol; ``"pairwise"`` asks
            Yes or No about each; ``"hybrid"`` asks for the best of the ``window`` candidates that did best pairwise.
        window: Most candidates of a list; it slides over more, see `UniMEReranker.rank`.
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
        method: Literal["listwise", "pairwise", "hybrid"] = "listwise",
        window: int = 10,
        batch_size: int = 32,
        name: str | None = None,
    ) -> None:
        if method not in ("listwise", "pairwise", "hybrid"):
            raise ValueError(f"method must be 'listwise', 'pairwise' or 'hybrid', got {method!r}")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        able = {"pairwise": True, "listwise": hasattr(reranker, "listwise_scores"), "hybrid": _ranks(reranker)}
        if not able[method]:
            raise ValueError(f"{type(reranker).__name__} cannot rank a list: use method='pairwise' or a UniMEReranker")
        if method != "pairwise" and _ranks(reranker) and longest_list(cast(Any, reranker).tokenizer, 2) < 2:
            raise ValueError("this reranker's tokenizer has no usable index tokens: use method='pairwise'")
        self.embedder, self.method, self.window, self.batch_size = embedder, method, window, batch_size
        self.reranker: Any = reranker
        self.judge: Judge = cast("Judge", reranker)
        if isinstance(reranker, CrossEncoder):
            self.judge = LocalJudge(reranker, batch_size=batch_size)
        self.top_k = top_k
        first = embedder.mteb_model_meta
        # Part of mteb's result key, so that other settings do not pass for these.
        settings = {"top_k": top_k, "method": method} | ({} if method == "pairwise" else {"window": window})
        self.mteb_model_meta: ModelMeta = first.model_copy(
            update={"name": name or f"{first.name}+reranker", "experiment_kwargs": settings}
        )
        self._corpus: Dataset | None = None

    @property
    def prompts(self) -> Mapping[str, str | None]:
        """The embedder's prompts: officially both stages read the same text beside an image."""
        return self.embedder.model.prompts

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
        with ForwardCounter(self.reranker) if isinstance(self.reranker, CrossEncoder) else nullcontext() as cost:
            few, rerank = min(SAMPLE, len(queries)), partial(self._rerank, corpus=corpus, found=found)
            _, time = timed_sample(rerank, queries.select(range(few)), len(queries))
            told = f"the best {self.top_k} of {len(queries):,} queries to rerank: {time}"
            logger.info("%s: %s", task_metadata.name, told)
            if len(queries) > few:
                rerank(queries.select(range(few, len(queries))))
        if cost is not None:
            COSTS[task_metadata.name] = cost.per_query(len(queries))
            logger.info("%s: reranking took, per query, %s", task_metadata.name, COSTS[task_metadata.name])
        return found

    def _rerank(self, queries: Dataset, corpus: Dataset, found: RetrievalOutputType) -> None:
        """Put the best of each query in the reranker's order, in place."""
        rows = {document: row for row, document in enumerate(corpus["id"])}
        query_ids = iter(queries["id"])
        for part in iter_items(queries, WINDOW, self.prompts):
            names, groups = [], []
            for query, query_id in zip(part, query_ids):
                best = sorted(found[query_id], key=found[query_id].__getitem__, reverse=True)[: self.top_k]
                chosen = iter_items(corpus.select([rows[name] for name in best]), prompts=self.prompts)
                names.append((query_id, best))
                groups.append(Group(query, [item for items in chosen for item in items]))
            for (query_id, best), scores in zip(names, self._scores(groups)):
                found[query_id].update(zip(best, map(float, _above_cosine(scores))))

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
        if not _ranks(self.reranker):
            return [self.reranker.listwise_scores(group.query, group.candidates) for group in groups]
        options = {"method": self.method, "window": self.window, "batch_size": self.batch_size}
        return [
            _by_index(self.reranker.rank(group.query, group.candidates, **options))
            if group.candidates
            else np.zeros(0)
            for group in groups
        ]


def _ranks(reranker: Any) -> bool:
    """Whether a reranker ranks lists longer than a window by itself."""
    return isinstance(reranker, UniMEReranker)


def _by_index(ranking: list[dict[str, Any]]) -> np.ndarray:
    """A score for each candidate that says at which place it is: probabilities of 0 and 1 would make ties."""
    scores = np.zeros(len(ranking))
    for index, entry in enumerate(ranking):
        scores[entry["corpus_id"]] = len(ranking) - index
    return scores


def _above_cosine(scores: np.ndarray) -> np.ndarray:
    """Map logits into (2, 4) in float64, strictly increasing: a probability would saturate and make ties."""
    logits = np.asarray(scores, dtype=np.float64)
    return 3.0 + logits / (1.0 + np.abs(logits))
