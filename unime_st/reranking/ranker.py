"""Ranker: pairwise, listwise and hybrid scores of documents, computed with shared prompt prefixes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer

from unime_st.data import BadImageError, Item
from unime_st.losses.list_answers import longest_list
from unime_st.reranking.parsing import image_error
from unime_st.scoring.chat_tokenizer import PromptTooLongError
from unime_st.scoring.groups import PairOrder
from unime_st.scoring.list_scorer import ListScorer, rotations, sliding_window
from unime_st.scoring.loading import generative_parts
from unime_st.scoring.pair_scorer import PairScorer, PairScores, evaluation_mode, score_pairs
from unime_st.scoring.prompt_encoder import Query

logger = logging.getLogger(__name__)

Ranking = list[dict[str, Any]]
Method = Literal["pairwise", "listwise", "hybrid"]


class Ranker:
    """Scores the documents of a query one by one or in lists; images and prefixes are computed once.

    Args:
        model: Generative ``CrossEncoder``, ``[Transformer, LogitScore(yes, no)]``.

    Attributes:
        pairs: Pair scorer.
        lists: List scorer, with the same images.
        state: What the ranker depends on, see :meth:`state_of`.

    Raises:
        ValueError: If the model is of another kind.

    Example:
        See :meth:`unime_st.UniMEReranker.rank`, which uses it.
    """

    def __init__(self, model: CrossEncoder) -> None:
        transformer, answer_ids = generative_parts(model)
        self.model = model
        self.state = self.state_of(model)
        self.pairs = PairScorer(transformer, str(transformer.processor.chat_template), answer_ids)
        self.lists = ListScorer(transformer, self.pairs)

    @staticmethod
    def state_of(model: CrossEncoder) -> tuple[object, ...]:
        """Return what a ranker depends on: template, image processor, its options and the weights' module."""
        transformer = cast(Transformer, model[0])
        return (
            transformer.processor.chat_template,
            transformer.processor.image_processor,
            dict(transformer.processing_kwargs.get("image", {})),
            transformer.model,
        )

    def rank(
        self,
        query: Item,
        documents: Sequence[Item],
        method: Method,
        *,
        window: int = 10,
        permutations: int = 1,
        batch_size: int = 32,
        names: Sequence[str] | None = None,
        pair_order: PairOrder = "query_first",
    ) -> PairScores:
        """Score the documents of one query; equal ones are scored once.

        Args:
            query: The query.
            documents: Its documents.
            method: "pairwise", "listwise" or "hybrid" (a list of the ``window`` documents with the best pairwise
                scores).
            window: Maximum length of a list.
            permutations: Orders in which each list is shown, see :meth:`listwise`.
            batch_size: Prompts per forward pass.
            names: Names of the documents in error messages. Defaults to "document 0", ...
            pair_order: Order of query and document in the pairwise prompt, as for
                :class:`~unime_st.judging.LocalJudge`. Defaults to "query_first".

        Returns:
            Scores, NaN where an image cannot be read, and the reasons. Pairwise scores are float32 log-odds; listwise
            scores are probabilities to be the best; hybrid scores are 1 + P(best of the list) for the documents of the
            list and P(Yes) for the others.

        Raises:
            BadImageError: If the query's image cannot be read.
            PromptTooLongError: If a prompt is longer than the model takes; the message names the document.
            FloatingPointError: If a logit is not finite.
        """
        names = names or [f"document {index}" for index in range(len(documents))]
        error = image_error(query)
        if error is not None:
            raise error
        if method == "listwise":
            reasons: list[ValueError | None] = [image_error(document) for document in documents]
            scores = np.full(len(documents), np.nan)
            readable = [index for index, reason in enumerate(reasons) if reason is None]
            scores[readable] = self._in_windows(query, documents, readable, window, permutations, batch_size, names)
            return PairScores(scores, reasons)
        ((log_odds, reasons),) = self.pairwise([(query, documents)], batch_size, pair_order)
        for name, reason in zip(names, reasons, strict=True):
            if reason is not None and not isinstance(reason, BadImageError):
                raise type(reason)(f"{name}: {reason}") from reason
        if method == "pairwise":
            return PairScores(log_odds, reasons)
        scores = torch.from_numpy(log_odds).double().sigmoid().numpy()
        readable = [index for index in range(len(documents)) if reasons[index] is None]
        best = sorted(readable, key=lambda index: -log_odds[index])[:window]
        if len(best) > 1:
            scores[best] = 1.0 + self._in_windows(query, documents, best, window, permutations, batch_size, names)
        return PairScores(scores, reasons)

    def pairwise(
        self,
        queries: Sequence[Query],
        batch_size: int = 32,
        pair_order: PairOrder = "query_first",
        *,
        show_progress_bar: bool = False,
    ) -> list[PairScores]:
        """Ask Yes or No about each document of each query, see :func:`~unime_st.scoring.pair_scorer.score_pairs`."""
        return score_pairs(
            self.pairs,
            queries,
            batch_size=batch_size,
            pair_order=pair_order,
            description="Reranking",
            show_progress_bar=show_progress_bar,
        )

    def listwise(
        self,
        query: Item,
        documents: Sequence[Item],
        permutations: int = 1,
        batch_size: int = 32,
        names: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Ask for the best of all documents in one list: float32 logits of shape (documents,).

        With ``permutations`` the list is shown in so many orders, each a shift of the given one, and the
        log-probabilities are averaged. ``names`` are those of the documents in error messages.

        Raises:
            BadImageError: If an image cannot be read.
            PromptTooLongError: If the prompt is longer than the model takes.
            ValueError: If the list is longer than the tokenizer can number.
            FloatingPointError: If a logit is not finite.
        """
        orders = rotations(len(documents), permutations)
        with evaluation_mode(self.model):
            try:
                found = self.lists(query, [[documents[index] for index in order] for order in orders], batch_size)
            except PromptTooLongError as error:
                names = names or [f"document {index}" for index in range(len(documents))]
                longest = max(range(len(documents)), key=lambda index: len(documents[index].text or ""))
                raise PromptTooLongError(
                    f"a list of {len(documents)}, in which {names[longest]} has the longest text: {error}, or ask about "
                    "fewer documents at once (a smaller window)"
                ) from error
        if not np.isfinite(np.concatenate(found)).all():
            raise FloatingPointError(
                f"the logits of a list are {found[0].tolist()}, so the model overflowed or is broken (dtype "
                f"{self.model.dtype}). Load it in bfloat16 or float32."
            )
        if len(orders) == 1:
            return found[0]
        scores = np.zeros(len(documents), dtype=np.float32)
        for order, logits in zip(orders, found, strict=True):
            scores[order] += torch.from_numpy(logits).log_softmax(0).numpy() / len(orders)
        return scores

    def _in_windows(
        self,
        query: Item,
        documents: Sequence[Item],
        chosen: Sequence[int],
        window: int,
        permutations: int,
        batch_size: int,
        names: Sequence[str],
    ) -> np.ndarray:
        """Probability of each chosen document to be the best, from lists of at most ``window`` documents."""
        indices: dict[Item, list[int]] = {}
        for index in chosen:
            indices.setdefault(documents[index], []).append(index)
        distinct = list(indices)
        if not distinct:
            return np.zeros(0)
        most = longest_list(self.model.tokenizer, min(window, len(distinct)))
        if len(distinct) > 1 and most < 2:
            raise ValueError(
                "this tokenizer has no usable index tokens, so it cannot rank a list: use method='pairwise'."
            )

        def score(members: list[int]) -> np.ndarray:
            own = [names[indices[distinct[member]][0]] for member in members]
            return self.listwise(query, [distinct[member] for member in members], permutations, batch_size, own)

        _, logits = sliding_window(len(distinct), max(most, 1), score)
        probability = dict(zip(distinct, torch.from_numpy(logits).softmax(0).tolist(), strict=True))
        return np.array([probability[documents[index]] for index in chosen])


def sort_by_score(
    corpus_ids: Sequence[int] | Sequence[str], scores: np.ndarray, reasons: Sequence[ValueError | None], name: str
) -> Ranking:
    """Sort documents by their scores; those that could not be scored come last, with the reason under "error".

    ``name`` is the name of a document in the log, with a place for its index, such as "document {}". Equal scores keep
    the given order.

    Example:
        >>> import numpy as np
        >>> from unime_st.reranking.ranker import sort_by_score
        >>> sort_by_score([0, 1], np.array([0.25, 0.5]), [None, None], "document {}")
        [{'corpus_id': 1, 'score': 0.5}, {'corpus_id': 0, 'score': 0.25}]
    """
    ranking: Ranking = []
    for index in sorted(range(len(scores)), key=lambda index: (reasons[index] is not None, -scores[index])):
        entry: dict[str, Any] = {"corpus_id": corpus_ids[index], "score": float(scores[index])}
        if reasons[index] is not None:
            logger.warning("%s is ranked last: %s", name.format(corpus_ids[index]), reasons[index])
            entry["error"] = str(reasons[index])
        ranking.append(entry)
    return ranking
