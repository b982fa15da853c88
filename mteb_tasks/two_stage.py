"""Two-stage models for mteb: an embedder retrieves, a reranker orders the top candidates."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, cast
from uuid import uuid4

import numpy as np
from mteb.models import ModelMeta
from mteb.types import PromptType
from sentence_transformers import CrossEncoder

from mteb_tasks.columns import has_encoded_items, iter_items
from mteb_tasks.embedding_estimate import timed_sample
from mteb_tasks.foreign_rows import iter_table
from mteb_tasks.item_embedder import WINDOW
from mteb_tasks.loader import UniMELoader
from mteb_tasks.metadata import modalities_of
from unime_st.data.items import Item
from unime_st.encoding import weights_fingerprint
from unime_st.encoding.model_identity import model_settings
from unime_st.files import digest
from unime_st.judging import Group, HttpJudge, Judge, LocalJudge
from unime_st.reranking.ranker import sort_by_score
from unime_st.reranking.search import check_fusion, fused, second_stage
from unime_st.scoring.forward_counter import ForwardCount, ForwardCounter
from unime_st.scoring.groups import PairOrder
from unime_st.scoring.pair_scorer import PairScores

if TYPE_CHECKING:
    from datasets import Dataset
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import EncodeKwargs, RetrievalOutputType

logger = logging.getLogger(__name__)

SAMPLE = 4
"""Queries that are reranked first, to estimate the time of all."""

COSTS: dict[str, ForwardCount] = {}
"""Cost of reranking per query in each retrieval task of this process, for the end of ``mteb run``."""


class TwoStage:
    """Retrieve with an embedder, then let a reranker order the top candidates.

    An mteb search model. Documents beyond the top k keep their rank below the reranked ones. On compositional tasks
    the reranker scores caption and foil.

    Args:
        embedder: First stage, from `mteb_tasks.wrap` or the registry.
        reranker: Second stage: a `UniMEReranker` or other generative CrossEncoder, or (pairwise) any judge.
        top_k: Candidates handed to the reranker. Defaults to 10, as in the paper.
        method: ``"listwise"`` asks once for the best of all candidates, the published protocol; ``"pairwise"`` asks
            Yes or No about each; ``"hybrid"`` asks for the best of the ``window`` candidates that did best pairwise.
        window: Maximum length of a list; it slides over more, see `UniMEReranker.rank`. Defaults to 10.
        batch_size: Pairs per forward pass of the second stage. Defaults to 32.
        pair_order: Order of query and document in the pairwise prompt, see `unime_st.judging.LocalJudge`. Defaults to
            "query_first", the paper's.
        alpha: Rank by ``alpha * cosine + log_odds`` of the reranker (``method="pairwise"``), see
            `unime_st.reranking.search`. Defaults to None: the reranker decides alone, as in the paper.
        name: ``organisation/model`` under which results are filed; None appends ``+reranker`` to the embedder's name.

    Raises:
        ValueError: If an option is wrong, or `method` needs lists and the reranker cannot rank them.

    References:
        UniME-V2 (https://arxiv.org/abs/2510.13515), "UniME-V2-Reranker", inference.

    Example:
        >>> from mteb_tasks import wrap
        >>> from unime_st import UniME, UniMEReranker
        >>> embedder = wrap(UniME("unime-tiny", device="cpu"), "unime/tiny")
        >>> TwoStage(embedder, UniMEReranker("unime-tiny", template="tiny")).mteb_model_meta.name
        'unime/tiny+reranker'
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
        pair_order: PairOrder = "query_first",
        alpha: float | None = None,
        name: str | None = None,
    ) -> None:
        if method not in ("listwise", "pairwise", "hybrid"):
            raise ValueError(f"method must be 'listwise', 'pairwise' or 'hybrid', got {method!r}")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.embedder, self.reranker, self.method, self.top_k = embedder, reranker, method, top_k
        check_fusion(alpha, method)
        self.alpha, self._pair_order = alpha, pair_order
        self._window, self._batch_size = window, batch_size
        self._score = self._second_stage()
        self.judge: Judge = (
            LocalJudge(reranker, batch_size=batch_size, pair_order=pair_order)
            if isinstance(reranker, CrossEncoder)
            else cast(Judge, reranker)
        )
        self._name = name or f"{embedder.mteb_model_meta.name}+reranker"
        self._given_meta: ModelMeta | None = None
        self._token = uuid4().hex
        self._corpus: Dataset | None = None

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Metadata under which mteb files results, with a revision of both stages as they are now."""
        if self._given_meta is not None:
            return self._given_meta
        first = self.embedder.mteb_model_meta
        # Part of mteb's result key, so that other settings do not pass for these.
        settings: dict[str, object] = {**(first.experiment_kwargs or {}), "top_k": self.top_k, "method": self.method}
        settings |= {} if self.method == "pairwise" else {"window": self._window}
        settings |= {} if self._pair_order == "query_first" else {"pair_order": self._pair_order}
        settings |= {} if self.alpha is None else {"alpha": self.alpha}
        revision = digest(f"{first.revision} {self._identity()}", length=16)
        known = {"name": self._name, "revision": revision, "experiment_kwargs": settings}
        return first.model_copy(update={**known, "modalities": self._modalities(first.modalities)})

    @mteb_model_meta.setter
    def mteb_model_meta(self, meta: ModelMeta) -> None:
        self._given_meta = meta

    def _modalities(self, first: Sequence[str]) -> list[str]:
        """Modalities that both stages take; a judge other than one behind a server takes those of the embedder."""
        if isinstance(self.reranker, CrossEncoder):
            return [name for name in first if name in modalities_of(self.reranker)]
        return [name for name in first if name != "video" or not isinstance(self.reranker, HttpJudge)]

    def _identity(self) -> str:
        """What tells the second stage from another one: weights and settings of a model, name and prompt of a judge."""
        if isinstance(self.reranker, CrossEncoder):
            settings = json.dumps(model_settings(self.reranker), sort_keys=True, default=repr)
            return f"{weights_fingerprint(self.reranker)} {settings}"
        known = [getattr(self.reranker, name, None) for name in ("name", "revision", "prompt_hash")]
        return repr(known) if None not in known else self._token

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_score": None}  # a function that holds the engine of the reranker

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._score = self._second_stage()

    def _second_stage(self) -> Callable[..., list[PairScores]]:
        return second_stage(
            self.reranker, self.method, window=self._window, batch_size=self._batch_size, pair_order=self._pair_order
        )

    @property
    def prompts(self) -> Mapping[str, str | None]:
        """The embedder's prompts: officially both stages read the same text beside an image."""
        return self.embedder.model.prompts

    def index(self, corpus: Dataset, **kwargs: Any) -> None:
        """Take the corpus of the next `search`; see `mteb.models.SearchProtocol.index`."""
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
        encode_kwargs: EncodeKwargs,
        **kwargs: Any,
    ) -> RetrievalOutputType:
        """Rank the indexed corpus for each query; see `mteb.models.SearchProtocol.search`.

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
            queries, task_metadata=task_metadata, hf_split=hf_split, hf_subset=hf_subset,
            top_k=max(top_k, self.top_k), encode_kwargs=encode_kwargs, **kwargs,
        )  # fmt: skip
        rows = {document: row for row, document in enumerate(corpus["id"])}
        by_rank = self.method != "pairwise" or self.alpha is not None

        def rerank(part: Dataset) -> None:
            """Put the best of each query in the reranker's order, in place."""
            query_ids = iter(part["id"])
            for window in _items(part, task_metadata, PromptType("query"), self.prompts):
                ids = [query_id for _, query_id in zip(window, query_ids)]
                best = [sorted(found[own], key=found[own].__getitem__, reverse=True)[: self.top_k] for own in ids]
                named = sorted({document for own in best for document in own})
                documents = corpus.select([rows[document] for document in named])
                items = chain.from_iterable(_items(documents, task_metadata, PromptType("document"), self.prompts))
                item_of = dict(zip(named, items))
                groups = [(query, [item_of[document] for document in own]) for query, own in zip(window, best)]
                for query_id, own, scored in zip(ids, best, self._score(groups, best)):
                    scored = fused(scored, [found[query_id][document] for document in own], self.alpha)
                    found[query_id].update(zip(own, _above_cosine(scored, by_rank=by_rank)))

        with ForwardCounter(self.reranker) if isinstance(self.reranker, CrossEncoder) else nullcontext() as cost:
            few = min(SAMPLE, len(queries))
            _, time = timed_sample(rerank, queries.select(range(few)), len(queries))
            estimate = f"the best {self.top_k} of {len(queries):,} queries to rerank: {time}"
            logger.info("%s: %s", task_metadata.name, estimate)
            if len(queries) > few:
                rerank(queries.select(range(few, len(queries))))
        if cost is not None:
            COSTS[task_metadata.name] = cost.per_query(len(queries))
            logger.info("%s: reranking took, per query, %s", task_metadata.name, COSTS[task_metadata.name])
        return found

    def score_groups(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """Judge pairs: log-odds of Yes for each candidate of each group.

        Args:
            groups: Queries with their candidates.

        Returns:
            One float32 array for each group.
        """
        return self.judge.score(groups)


def _items(
    table: Dataset, metadata: TaskMetadata, side: PromptType, prompts: Mapping[str, str | None]
) -> Iterator[list[Item]]:
    """Items of a table of ours, or of a table of others as mteb shows it to its own models."""
    if has_encoded_items(table):
        yield from iter_items(table, WINDOW, prompts)
    else:
        yield from iter_table(table, metadata, side)


def _above_cosine(scored: PairScores, *, by_rank: bool) -> list[float]:
    """Map scores into [2, 4), strictly increasing; documents without a score come last.

    A probability of a list may be 0 or 1 and make ties, and fused scores may be large: hence the rank instead.
    """
    ranking = sort_by_score(range(len(scored.scores)), scored.scores, scored.reasons, "document {}")
    values = np.zeros(len(ranking))
    for index, entry in enumerate(ranking):
        score = len(ranking) - index if by_rank else entry["score"]
        values[entry["corpus_id"]] = 2.0 if "error" in entry else 3.0 + score / (1.0 + abs(score))
    return values.tolist()
