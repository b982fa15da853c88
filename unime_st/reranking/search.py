"""Two-stage search: embed everything, keep the nearest, rerank those."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, cast

import numpy as np
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from tqdm.auto import tqdm

from unime_st.encoding import encode_items
from unime_st.judging import Group, Judge, LocalJudge, as_item
from unime_st.judging.prompts import ItemLike
from unime_st.reranking.cost import measured
from unime_st.reranking.model import UniMEReranker
from unime_st.retrieval import top_k as nearest

logger = logging.getLogger(__name__)


def search(
    queries: Sequence[ItemLike],
    corpus: Sequence[ItemLike],
    embedder: SentenceTransformer,
    reranker: CrossEncoder | Judge,
    top_k: int = 10,
    *,
    method: Literal["pairwise", "listwise", "hybrid"] = "pairwise",
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> list[list[dict[str, Any]]]:
    """Retrieve by embedding, then rerank the nearest.

    Distinct items are embedded once, distinct pairs judged once, and every image is processed once per model. What
    reranking cost per query is logged (level INFO).

    Args:
        queries: Items, texts, images or dicts of them.
        corpus: The same, what is searched.
        embedder: Any embedding model that takes the inputs.
        reranker: A :class:`~unime_st.UniMEReranker` or other generative ``CrossEncoder``, or a judge.
        top_k: How many of the corpus to keep and rerank per query. Defaults to 10, as in the paper.
        method: "pairwise" scores each of the nearest, for all queries together; "listwise" and "hybrid" are those of
            :meth:`UniMEReranker.rank`, query by query. Defaults to "pairwise".
        batch_size: Items and pairs per forward pass. Defaults to 32.
        show_progress_bar: Whether to show progress. Defaults to False.

    Returns:
        list[list[dict]]: Per query, best first, ``{"corpus_id": int, "score": float, "similarity": float}``: the
        place in ``corpus``, the reranker's score (pairwise the probability of Yes) and the cosine similarity.

    Raises:
        BadImageError: If an image cannot be read.
        ValueError: If ``top_k`` is below 1, or the reranker cannot rank lists and the method needs it.

    References:
        UniME-V2 (https://arxiv.org/abs/2510.13515), "UniME-V2-Reranker", inference.

    Example:
        >>> from unime_st import UniME, UniMEReranker
        >>> from unime_st.reranking import search
        >>> embedder, reranker = UniME("unime-tiny"), UniMEReranker("unime-tiny", template="tiny")
        >>> found = search(["a red square"], ["a blue circle", "a red square"], embedder, reranker, top_k=2)
        >>> sorted(entry["corpus_id"] for entry in found[0])
        [0, 1]
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    asked, offered = [as_item(query) for query in queries], [as_item(document) for document in corpus]
    if not asked or not offered:
        return [[] for _ in asked]
    vectors = encode_items(embedder, [*asked, *offered], batch_size=batch_size, show_progress_bar=show_progress_bar)
    similarities, found = nearest(vectors[: len(asked)], vectors[len(asked) :], min(top_k, len(offered)))
    groups = [Group(query, [offered[place] for place in row]) for query, row in zip(asked, found, strict=True)]
    scores: list[np.ndarray]
    with measured(reranker) if isinstance(reranker, CrossEncoder) else nullcontext() as cost:
        if method == "pairwise":
            judge = cast(Judge, reranker)
            if isinstance(reranker, CrossEncoder):
                judge = LocalJudge(reranker, batch_size=batch_size, show_progress_bar=show_progress_bar)
            scores = [torch.from_numpy(log_odds).sigmoid().numpy() for log_odds in judge.score(groups)]
        elif isinstance(reranker, UniMEReranker):
            options: dict[str, Any] = {"method": method, "window": max(top_k, 2), "batch_size": batch_size}
            waiting = tqdm(groups, desc="Reranking", unit="query", disable=not show_progress_bar)
            scores = [_by_place(reranker.rank(group.query, group.candidates, **options)) for group in waiting]
        else:
            raise ValueError(f"{type(reranker).__name__} ranks pairwise only; method={method!r} needs a UniMEReranker")
    if cost is not None:
        logger.info("reranked %d queries %s; per query %s", len(groups), method, cost.per_query(len(groups)))
    return [_ranked(row, similarity, own) for row, similarity, own in zip(found, similarities, scores, strict=True)]


def _by_place(ranking: list[dict[str, Any]]) -> np.ndarray:
    """Scores in the order of the documents."""
    return np.array([entry["score"] for entry in sorted(ranking, key=lambda entry: entry["corpus_id"])])


def _ranked(row: np.ndarray, similarity: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
    """Sort the candidates of one query; equal scores keep the order of the embedder."""
    return [
        {"corpus_id": int(row[place]), "score": float(scores[place]), "similarity": float(similarity[place])}
        for place in np.argsort(-scores, kind="stable")
    ]
