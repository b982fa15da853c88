"""Two-stage search: embed queries and corpus, retrieve the nearest documents, rerank those."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from tqdm.auto import tqdm

from unime_st.data import BadImageError, Item
from unime_st.encoding import encode_items
from unime_st.options import check_count
from unime_st.reranking.parsing import parse_inputs, to_item
from unime_st.reranking.ranker import Method, Ranker, Ranking, sort_by_score
from unime_st.reranking.unime_reranker import UniMEReranker
from unime_st.retrieval import Hit, Index
from unime_st.retrieval import top_k as nearest
from unime_st.scoring.forward_counter import ForwardCounter
from unime_st.scoring.groups import Group, Judge, PairError, PairOrder, orders_of
from unime_st.scoring.pair_scorer import PairScores
from unime_st.scoring.prompt_encoder import Query
from unime_st.scoring.prompts import ItemLike

logger = logging.getLogger(__name__)


def search(
    queries: Sequence[ItemLike],
    corpus: Sequence[ItemLike] | Index,
    embedder: SentenceTransformer,
    reranker: CrossEncoder | Judge,
    top_k: int = 10,
    *,
    method: Method = "pairwise",
    pair_order: PairOrder = "query_first",
    alpha: float | None = None,
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> list[Ranking]:
    """Retrieve the nearest documents by their embeddings, then rerank them.

    Distinct items are embedded once, distinct pairs scored once, and every image is processed once per model. The cost
    of reranking per query is logged (level INFO). A document that cannot be embedded is never found; one that is found
    but cannot be reranked comes last in its row, with the reason under "error". Both are logged (level WARNING).

    Args:
        queries: Items, texts, images or dicts of them; as in :meth:`UniMEReranker.rank`, a str that names an existing
            image file is opened.
        corpus: Documents to search, of the same kinds; or an :class:`~unime_st.retrieval.Index` of them, whose vectors
            are used: only the queries are embedded.
        embedder: Embedding model that takes the inputs; for an index, that of the index.
        reranker: A :class:`~unime_st.UniMEReranker` or other generative ``CrossEncoder``, or a judge.
        top_k: Number of documents to retrieve and rerank per query. Defaults to 10, as in the paper.
        method: "pairwise" scores each of the retrieved documents, for all queries together; "listwise" and "hybrid"
            are those of :meth:`UniMEReranker.rank`, query by query. Defaults to "pairwise".
        pair_order: Order of query and document in the pairwise prompt, as for
            :class:`~unime_st.judging.LocalJudge`. Defaults to "query_first".
        alpha: Rank by ``alpha * similarity + log_odds``, pairwise only: with 1 / the temperature of the embedder the
            sum of both models' logits. See :func:`~unime_st.reranking.fusion.fit_fusion` to fit it. Defaults to None:
            the reranker decides alone, as in the paper.
        batch_size: Items and pairs per forward pass. Defaults to 32.
        show_progress_bar: Whether to show progress. Defaults to False.

    Returns:
        list[list[dict]]: Per query, best first, ``{"corpus_id": int, "score": float, "similarity": float}``: the index
        in ``corpus`` (for an index the id), the reranker's score (pairwise the probability of Yes, with ``alpha`` the
        weighted sum) and the cosine similarity.

    Raises:
        BadImageError: If a query's image cannot be read.
        TypeError: If an input is of an unsupported type.
        ValueError: If ``top_k`` or ``batch_size`` is below 1, a text is empty, the index is one of another model,
            ``method`` needs lists and the reranker cannot rank them, or ``alpha`` is not a number of at least 0.

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
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        check_count(name, value)
    check_fusion(alpha, method)
    if isinstance(corpus, Index):
        corpus.check_model(embedder)
        found = _indexed(queries, corpus, top_k, batch_size)
    else:
        found = retrieve(queries, corpus, embedder, top_k, batch_size, show_progress_bar)
    if not found or not found[0].names:
        return [[] for _ in queries]
    groups = [(own.query, own.documents) for own in found]
    rerank = second_stage(
        reranker,
        method,
        window=max(top_k, 2),
        pair_order=pair_order,
        batch_size=batch_size,
        show_progress_bar=show_progress_bar,
    )
    model = reranker if isinstance(reranker, CrossEncoder) else getattr(reranker, "model", None)
    with ForwardCounter(model) if isinstance(model, CrossEncoder) else nullcontext() as count:
        labels = [[f"corpus[{name}]" for name in own.names] for own in found]
        scored = rerank(groups, labels)
    if count is not None:
        logger.info("reranked %d queries %s; per query %s", len(groups), method, count.per_query(len(groups)))
    rankings = []
    if method == "pairwise":
        scored = [
            _final(fused(pairs, own.similarities, alpha), alpha) for own, pairs in zip(found, scored, strict=True)
        ]
    for own, (scores, reasons) in zip(found, scored, strict=True):
        by_name = dict(zip(own.names, own.similarities, strict=True))
        ranking = sort_by_score(own.names, scores, reasons, "corpus[{}]")
        rankings.append([{**entry, "similarity": by_name[entry["corpus_id"]]} for entry in ranking])
    return rankings


def rerank_hits(
    queries: Sequence[ItemLike],
    hits: Sequence[Sequence[Hit]],
    reranker: CrossEncoder | Judge,
    *,
    pair_order: PairOrder = "query_first",
    alpha: float | None = None,
    batch_size: int = 32,
) -> list[list[Hit]]:
    """Rerank the results of :meth:`Index.search <unime_st.retrieval.Index.search>` pairwise, all queries together.

    Args:
        queries: The queries.
        hits: Results of each query.
        reranker: As for :func:`search`.
        pair_order: As for :func:`search`.
        alpha: As for :func:`search`.
        batch_size: Pairs per forward pass. Defaults to 32.

    Returns:
        list[list[Hit]]: The hits, best first, with the score of :func:`search`.

    Raises:
        ValueError: If an option is wrong.

    Example:
        >>> from unime_st import UniME, UniMEReranker
        >>> from unime_st.reranking.search import rerank_hits
        >>> from unime_st.retrieval import Index
        >>> index = Index.build(["a red circle", "a star"], UniME("unime-tiny", device="cpu"), ids=["circle", "star"])
        >>> hits = index.search(["a star"], 2)
        >>> len(rerank_hits(["a star"], hits, UniMEReranker("unime-tiny", device="cpu"), alpha=20)[0])
        2
    """
    check_fusion(alpha, "pairwise")
    items = [to_item(query) for query in queries]
    groups = [(item, [hit.item for hit in own]) for item, own in zip(items, hits, strict=True)]
    rerank = second_stage(reranker, "pairwise", pair_order=pair_order, batch_size=batch_size)
    names = [[hit.id for hit in own] for own in hits]
    ordered = []
    for own, scored in zip(hits, rerank(groups, names), strict=True):
        final = _final(fused(scored, [hit.similarity for hit in own], alpha), alpha)
        ranking = sort_by_score(range(len(own)), final.scores, final.reasons, "hit {}")
        ordered.append([replace(own[entry["corpus_id"]], score=entry["score"]) for entry in ranking])
    return ordered


def check_fusion(alpha: float | None, method: Method) -> None:
    """Raise ValueError if alpha is not a finite number of at least 0, or is given for lists, which have no log-odds.

    Example:
        >>> check_fusion(20.0, "pairwise")
    """
    if alpha is None:
        return
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be a finite number of at least 0, or None, got {alpha!r}")
    if method != "pairwise":
        raise ValueError(
            f"alpha weighs the similarity against pairwise log-odds: expected method='pairwise', got {method!r}"
        )


def fused(scored: PairScores, similarities: Sequence[float], alpha: float | None) -> PairScores:
    """``alpha * similarity + log_odds`` of the documents of a query; the log-odds alone where alpha is None.

    Example:
        >>> import numpy as np
        >>> fused(PairScores(np.array([1.0, -1.0]), [None, None]), [0.5, 0.75], 20.0).scores.tolist()
        [11.0, 14.0]
    """
    if alpha is None:
        return scored
    return PairScores(alpha * np.asarray(similarities, dtype=np.float64) + scored.scores, scored.reasons)


@dataclass(frozen=True)
class Retrieved:
    """A query and its nearest documents, the nearest first, by index or id."""

    query: Item
    documents: list[Item]
    names: list[int] | list[str]
    similarities: list[float]


def retrieve(
    queries: Sequence[ItemLike],
    corpus: Sequence[ItemLike],
    embedder: SentenceTransformer,
    k: int,
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> list[Retrieved]:
    """First stage of :func:`search`: the ``k`` nearest documents of each query; none where there is no document."""
    items, readable, vectors, embedded = _embed(queries, corpus, embedder, batch_size, show_progress_bar)
    rows = len(queries) + np.flatnonzero(embedded[len(queries) :])
    if not len(queries) or not len(rows):
        return []
    similarities, found = nearest(vectors[: len(queries)], vectors[rows], min(k, len(rows)))
    corpus_ids = readable[rows[found]] - len(queries)
    return [
        Retrieved(
            items[row], [items[rows[index]] for index in own], corpus_ids[row].tolist(), similarities[row].tolist()
        )
        for row, own in enumerate(found)
    ]


def _indexed(queries: Sequence[ItemLike], index: Index, k: int, batch_size: int) -> list[Retrieved]:
    items = [to_item(query) for query in queries]
    for row, item in enumerate(items):
        _check_text(item, f"queries[{row}]")
    hits = index.search(items, min(k, max(1, len(index))), batch_size=batch_size)
    return [
        Retrieved(item, [hit.item for hit in own], [hit.id for hit in own], [hit.similarity for hit in own])
        for item, own in zip(items, hits, strict=True)
    ]


def _check_text(item: Item, name: str) -> None:
    if item.image is None and item.video is None and not (item.text or "").strip():
        raise ValueError(f"{name}: an empty text cannot be embedded")


def _embed(
    queries: Sequence[ItemLike],
    corpus: Sequence[ItemLike],
    embedder: SentenceTransformer,
    batch_size: int,
    show_progress_bar: bool,
) -> tuple[list[Item], np.ndarray, np.ndarray, np.ndarray]:
    """Embed queries and corpus.

    Returns:
        tuple: The items that could be read, queries first; the index of each among all inputs; their vectors; and which
        of them have one.

    Raises:
        BadImageError: If a query's image cannot be read; documents are logged.
    """
    names = [
        f"{side}[{index}]" for side, given in (("queries", queries), ("corpus", corpus)) for index in range(len(given))
    ]
    parsed = parse_inputs([*queries, *corpus])
    parsed.raise_for_invalid(names)
    for name, item in zip(names, parsed.items, strict=True):
        if item is not None:
            _check_text(item, name)
    readable = np.array([index for index, item in enumerate(parsed.items) if item is not None], dtype=np.int64)
    items = [item for item in parsed.items if item is not None]
    failed: dict[int, str] = {}
    vectors, embedded = encode_items(
        embedder, items, batch_size=batch_size, show_progress_bar=show_progress_bar, on_error="skip", reasons=failed
    )
    reasons = {index: str(error) for index, error in enumerate(parsed.errors) if error is not None}
    reasons |= {int(readable[row]): reason for row, reason in failed.items()}
    for index, reason in sorted(reasons.items()):
        if index < len(queries):
            raise BadImageError(f"{names[index]}: {reason}")
        logger.warning("%s is left out: %s", names[index], reason)
    return items, readable, vectors, embedded


def second_stage(
    reranker: CrossEncoder | Judge,
    method: Method,
    *,
    window: int = 10,
    pair_order: PairOrder = "query_first",
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> Callable[[Sequence[Query], Sequence[Sequence[str]]], list[PairScores]]:
    """Make the function that scores queries with their retrieved documents.

    It is made before the cost is counted, because making a ranker runs the model once.

    Args:
        reranker: As for :func:`search`; for ``method="listwise"`` also any object with ``listwise_scores``.
        method: As for :func:`search`.
        window: Maximum length of a list. Defaults to 10.
        pair_order: As for :func:`search`; a judge that cannot change its order is refused. Defaults to "query_first".
        batch_size: Pairs per forward pass. Defaults to 32.
        show_progress_bar: Whether to show progress. Defaults to False.

    Returns:
        Callable: Takes queries with their documents, and the documents' names for error messages. Returns per query the
        log-odds of Yes (pairwise) or the scores of :meth:`Ranker.rank`, with the reasons for missing scores.

    Raises:
        ValueError: If ``method`` needs lists and the reranker cannot rank them, or ``pair_order`` does not apply.
    """
    turns = orders_of(pair_order) != ["query_first"]
    if method == "listwise" and turns:
        raise ValueError("pair_order is that of pairwise prompts: leave it out, or use method='pairwise'")
    if method == "pairwise":
        if not isinstance(reranker, CrossEncoder):
            if turns and not hasattr(reranker, "in_order"):
                raise ValueError(f"{type(reranker).__name__} has no pair_order to choose: set it on the judge itself")
            judge: Any = reranker
            judge = judge.in_order(pair_order) if turns else judge
            return lambda queries, names: _judged(judge, queries)
        engine = reranker.ranker() if isinstance(reranker, UniMEReranker) else Ranker(reranker)
        return lambda queries, names: engine.pairwise(
            queries, batch_size, pair_order, show_progress_bar=show_progress_bar
        )
    if isinstance(reranker, UniMEReranker):
        reranker.check_lists()
        listing = reranker.ranker()
    elif method != "listwise" or not hasattr(reranker, "listwise_scores"):
        raise ValueError(f"{type(reranker).__name__} ranks pairwise only; method={method!r} needs a UniMEReranker")

    lists: Any = reranker  # has listwise_scores, see above

    def by_query(queries: Sequence[Query], names: Sequence[Sequence[str]]) -> list[PairScores]:
        waiting = tqdm(queries, desc="Reranking", unit="query", disable=not show_progress_bar)
        scored = []
        for (query, documents), own in zip(waiting, names, strict=True):
            if isinstance(reranker, UniMEReranker):
                found = listing.rank(
                    query, documents, method, window=window, batch_size=batch_size, names=own, pair_order=pair_order
                )
                scored.append(PairScores(np.nan_to_num(found.scores), found.reasons))
            else:
                scored.append(PairScores(lists.listwise_scores(query, documents), [None] * len(documents)))
        return scored

    return by_query


def _judged(judge: Judge, queries: Sequence[Query]) -> list[PairScores]:
    errors: list[PairError] = []
    groups = [Group(query, documents) for query, documents in queries]
    collects = "errors" in inspect.signature(judge.score).parameters  # a judge may be as simple as score(groups)
    scored = judge.score(groups, errors=errors) if collects else judge.score(groups)
    found = [PairScores(scores, [None] * len(scores)) for scores in scored]
    for error in errors:
        found[error.group].reasons[error.candidate] = ValueError(error.reason)
    return found


def _final(scored: PairScores, alpha: float | None) -> PairScores:
    """P(Yes) of log-odds, and fused scores as they are; 0 where there is a reason."""
    scores = scored.scores if alpha is not None else torch.from_numpy(scored.scores).sigmoid().numpy()
    return PairScores(np.nan_to_num(scores), scored.reasons)
