"""Two-stage search: embed everything, keep the nearest, rerank those."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from tqdm.auto import tqdm

from unime_st.data import BadImageError, Item
from unime_st.encoding import encode_items
from unime_st.judging import Group, Judge, LocalJudge, PairError
from unime_st.reranking.forward_counter import measured
from unime_st.reranking.model import UniMEReranker
from unime_st.reranking.parsing import Offer, foreign, to_offers
from unime_st.reranking.ranker import UNREADABLE, Method, Scored
from unime_st.retrieval import top_k as nearest
from unime_st.scoring.prompts import ItemLike

logger = logging.getLogger(__name__)

Groups = Sequence[tuple[Item, Sequence[Offer]]]


def search(
    queries: Sequence[ItemLike],
    corpus: Sequence[ItemLike],
    embedder: SentenceTransformer,
    reranker: CrossEncoder | Judge,
    top_k: int = 10,
    *,
    method: Method = "pairwise",
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> list[list[dict[str, Any]]]:
    """Retrieve by embedding, then rerank the nearest.

    Distinct items are embedded once, distinct pairs judged once, and every image is processed once per model. What
    reranking cost per query is logged (level INFO). A document that cannot be embedded is never found; one that is
    found but cannot be reranked comes last in its row, with the reason under "error". Both are logged (level WARNING).

    Args:
        queries: Items, texts, images or dicts of them; as in :meth:`UniMEReranker.rank`, a str that names an existing
            image file is opened.
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
        BadImageError: If a query's image cannot be read.
        ValueError: If ``top_k`` or ``batch_size`` is below 1, or the reranker cannot rank lists and the method needs it.

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
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    asked, offered = _items("queries", queries), _items("corpus", corpus)
    vectors, mask, reasons = _embedded(embedder, [*asked, *offered], batch_size, show_progress_bar)
    for index, reason in sorted(reasons.items()):
        if index < len(asked):
            raise BadImageError(f"queries[{index}]: {reason}")
        logger.warning("corpus[%d] is left out: %s", index - len(asked), reason)
    readable = np.flatnonzero(mask[len(asked) :])
    if not asked or not len(readable):
        return [[] for _ in asked]
    similarities, found = nearest(vectors[: len(asked)], vectors[len(asked) :][readable], min(top_k, len(readable)))
    found = readable[found]
    groups = [(query, [cast(Item, offered[index]) for index in row]) for query, row in zip(asked, found, strict=True)]
    rerank = _reranking(reranker, method, max(top_k, 2), batch_size, show_progress_bar)
    counted = getattr(reranker, "model", None) if isinstance(reranker, LocalJudge) else reranker
    with measured(counted) if isinstance(counted, CrossEncoder) else nullcontext() as cost:
        scored = rerank(cast(Any, groups), found)
    if cost is not None:
        logger.info("reranked %d queries %s; per query %s", len(groups), method, cost.per_query(len(groups)))
    return [_ranked(row, similarity, *own) for row, similarity, own in zip(found, similarities, scored, strict=True)]


def _items(side: str, values: Sequence[Any]) -> list[Offer]:
    """Inputs as items; what is none is named."""
    offers = to_offers(values)
    index = foreign(offers)
    if index is not None:
        raise TypeError(f"{side}[{index}]: {offers[index]}")
    for index, offer in enumerate(offers):
        if isinstance(offer, Item) and offer.image is None and not (offer.text or "").strip():
            raise ValueError(f"{side}[{index}]: an empty text cannot be embedded")
    return offers


def _embedded(
    embedder: SentenceTransformer, offers: Sequence[Offer], batch_size: int, show_progress_bar: bool
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Vectors, which offers have one, and why the others have none."""
    indices = [index for index, offer in enumerate(offers) if isinstance(offer, Item)]
    failed: dict[int, str] = {}
    vectors, made = encode_items(
        embedder, [cast(Item, offers[index]) for index in indices], batch_size=batch_size,
        show_progress_bar=show_progress_bar, on_error="skip", reasons=failed,
    )  # fmt: skip
    reasons = {index: str(offer) for index, offer in enumerate(offers) if not isinstance(offer, Item)}
    reasons |= {indices[row]: reason for row, reason in failed.items()}
    mask = np.zeros(len(offers), dtype=bool)
    mask[indices] = made
    spread = np.full((len(offers), vectors.shape[1]), np.nan, dtype=np.float32)
    spread[indices] = vectors
    return spread, mask, reasons


def _reranking(
    reranker: CrossEncoder | Judge, method: Method, window: int, batch_size: int, show_progress_bar: bool
) -> Callable[[Groups, np.ndarray], list[Scored]]:
    """What scores groups; it is made before the cost is counted, because making it tries the model once."""
    if isinstance(reranker, UniMEReranker):
        engine = reranker._engine()
        if method == "pairwise":
            return lambda groups, found: [
                (_probabilities(log_odds), reasons)
                for log_odds, reasons in engine.pairwise(groups, batch_size, show_progress_bar=show_progress_bar)
            ]
        reranker._check_lists()

        def ranked(groups: Groups, found: np.ndarray) -> list[Scored]:
            waiting = tqdm(groups, desc="Reranking", unit="query", disable=not show_progress_bar)
            return [
                engine.rank(
                    query, documents, method, window=window, batch_size=batch_size,
                    names=[f"corpus[{index}]" for index in row],
                )
                for (query, documents), row in zip(waiting, found, strict=True)
            ]  # fmt: skip

        return ranked
    if method != "pairwise":
        raise ValueError(f"{type(reranker).__name__} ranks pairwise only; method={method!r} needs a UniMEReranker")
    judge = reranker
    if isinstance(reranker, CrossEncoder):
        judge = LocalJudge(reranker, batch_size=batch_size, show_progress_bar=show_progress_bar)
    return lambda groups, found: _judged(cast(Judge, judge), groups)


def _judged(judge: Judge, groups: Groups) -> list[Scored]:
    errors: list[PairError] = []
    rows = judge.score([Group(query, cast(Any, documents)) for query, documents in groups], errors=errors)
    reasons: list[list[ValueError | None]] = [[None] * len(documents) for _, documents in groups]
    for error in errors:
        reasons[error.group][error.candidate] = ValueError(error.reason)
    return [(_probabilities(np.nan_to_num(row, nan=UNREADABLE)), own) for row, own in zip(rows, reasons, strict=True)]


def _probabilities(log_odds: np.ndarray) -> np.ndarray:
    return torch.from_numpy(log_odds).sigmoid().numpy()


def _ranked(
    row: np.ndarray, similarity: np.ndarray, scores: np.ndarray, reasons: Sequence[ValueError | None]
) -> list[dict[str, Any]]:
    """Sort the candidates of one query; equal scores keep the order of the embedder."""
    entries: list[dict[str, Any]] = []
    for index in sorted(range(len(row)), key=lambda index: (reasons[index] is not None, -scores[index])):
        entry: dict[str, Any] = {
            "corpus_id": int(row[index]),
            "score": float(scores[index]),
            "similarity": float(similarity[index]),
        }
        if reasons[index] is not None:
            logger.warning("corpus[%d] is ranked last: %s", row[index], reasons[index])
            entry["error"] = str(reasons[index])
        entries.append(entry)
    return entries
