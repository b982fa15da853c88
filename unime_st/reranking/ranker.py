"""From a query and its documents to a ranking with scores: pairwise, listwise, and first one, then the other."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from tqdm.auto import tqdm

from unime_st.data import BadImageError, Item
from unime_st.losses.list_answers import longest_list
from unime_st.reranking.parsing import Offer, check_query, unreadable
from unime_st.scoring.list_scorer import ListScorer, rotations, slide
from unime_st.scoring.pair_scorer import PairScorer
from unime_st.scoring.prompt_encoder import PromptTooLongError

logger = logging.getLogger(__name__)

UNREADABLE = -1e4
"""Log-odds of a document whose image cannot be read: below all others, and a number."""

Ranking = list[dict[str, Any]]
Method = Literal["pairwise", "listwise", "hybrid"]
Scored = tuple[np.ndarray, list[ValueError | None]]
"""Score of each document, and why it has none: its image cannot be read, or its prompt is too long."""


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off for a while.

    Args:
        model: What is used.
    """
    # Switching all of a small model twice would cost a tenth of a list.
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


class Ranker:
    """Ranks documents with the judge's engine: every image is seen once, the query passes once.

    Args:
        model: Generative ``CrossEncoder``, ``[Transformer, LogitScore(yes, no)]``.

    Raises:
        TypeError: If the model is something else.

    Example:
        See :meth:`unime_st.UniMEReranker.rank`, which uses it.
    """

    def __init__(self, model: CrossEncoder) -> None:
        head = model[-1]
        if not isinstance(head, LogitScore) or head.false_token_id is None:
            raise TypeError(f"{type(head).__name__} does not answer Yes or No")
        self.model = model
        transformer = cast(Transformer, model[0])
        self.state = self.state_of(model)
        template = str(transformer.processor.chat_template)
        options = {**transformer.processing_kwargs.get("image", {})}
        self.pairs = PairScorer(transformer, template, [head.true_token_id, head.false_token_id], options=options)
        self.lists = ListScorer(transformer, self.pairs)

    @staticmethod
    def state_of(model: CrossEncoder) -> Any:
        """What a ranker is made for; when it changes, another is needed."""
        transformer = cast(Transformer, model[0])
        return (
            transformer.processor.chat_template,
            transformer.processor.image_processor,
            {**transformer.processing_kwargs.get("image", {})},
            transformer.model,
        )

    def rank(
        self,
        query: Item,
        documents: Sequence[Offer],
        method: Method,
        *,
        window: int = 10,
        permutations: int = 1,
        batch_size: int = 32,
        names: Sequence[str] | None = None,
    ) -> Scored:
        """Score the documents of one query.

        Args:
            query: What is asked.
            documents: What might meet it; equal ones are asked about once.
            method: "pairwise", "listwise" or "hybrid", which lists the ``window`` documents that did best pairwise.
            window: Most candidates of a list. Defaults to 10.
            permutations: Orders in which each list is asked about, see :meth:`listwise`. Defaults to 1.
            batch_size: Prompts per forward pass. Defaults to 32.
            names: What messages call the documents. Defaults to "document 0", ...

        Returns:
            tuple: Scores, and per document why its image cannot be read. Pairwise the scores are float32 log-odds,
            :data:`UNREADABLE` where there is a reason; listwise probabilities to be the best, 0 where there is a reason;
            hybrid 1 + P(best of the list) for documents of the list and P(Yes) for the others.

        Raises:
            BadImageError: If the query's image cannot be read.
            ValueError: If a prompt is longer than the model takes.
            FloatingPointError: If a logit is not finite.
        """
        names = names or [f"document {index}" for index in range(len(documents))]
        check_query(query)
        if method == "listwise":
            return self._in_windows(
                query, documents, unreadable(documents, decode=True), window, permutations, batch_size, names
            )
        ((log_odds, reasons),) = self.pairwise([(query, documents)], batch_size)
        for name, reason in zip(names, reasons, strict=True):
            if reason is not None and not isinstance(reason, BadImageError):
                raise type(reason)(f"{name}: {reason}") from reason
        if method == "pairwise":
            return log_odds, reasons
        scores = torch.from_numpy(log_odds).double().sigmoid().numpy()
        readable = [index for index in range(len(documents)) if reasons[index] is None]
        best = sorted(readable, key=lambda index: -log_odds[index])[:window]
        if len(best) > 1:
            listed, _ = self._in_windows(
                query,
                [documents[index] for index in best],
                [None] * len(best),
                window,
                permutations,
                batch_size,
                [names[index] for index in best],
            )
            scores[best] = 1.0 + listed
        return scores, reasons

    def pairwise(
        self, groups: Sequence[tuple[Item, Sequence[Offer]]], batch_size: int = 32, *, show_progress_bar: bool = False
    ) -> list[Scored]:
        """Ask Yes or No about each document of each query; equal pairs are asked about once.

        Args:
            groups: Queries with their documents.
            batch_size: Prompts per forward pass. Defaults to 32.
            show_progress_bar: Whether to show progress in pairs. Defaults to False.

        Returns:
            list[tuple]: Per query float32 log-odds of shape (documents,), :data:`UNREADABLE` where a pair cannot be
            scored, and per document why, else None.

        Raises:
            FloatingPointError: If a logit is not finite.
        """
        # Where pairs are computed on their own, an image that fails would take its batch along.
        decode = self.pairs.obstacle is not None
        found: list[Scored] = [
            (np.full(len(documents), UNREADABLE, dtype=np.float32), unreadable(documents, decode=decode))
            for _, documents in groups
        ]
        indices: dict[Item, dict[Item, list[tuple[int, int]]]] = {}
        for row, (query, documents) in enumerate(groups):
            for document, columns in _indices(documents, found[row][1]).items():
                cells = indices.setdefault(query, {}).setdefault(document, [])
                cells += [(row, column) for column in columns]
        total = sum(map(len, indices.values()))
        with (
            evaluating(self.model),
            tqdm(total=total, desc="Reranking", unit="pair", disable=not show_progress_bar) as progress,
        ):
            asked = [(query, list(documents)) for query, documents in indices.items()]
            for (query, document), outcome in self.pairs.score(asked, batch_size):
                failure = outcome if isinstance(outcome, ValueError) else None
                log_odds = (
                    UNREADABLE if isinstance(outcome, ValueError) else _finite(outcome[0] - outcome[1], self.model)
                )
                for row, column in indices[query][document]:
                    scores, reasons = found[row]
                    scores[column], reasons[column] = log_odds, failure
                progress.update()
        return found

    def listwise(
        self,
        query: Item,
        documents: Sequence[Item],
        permutations: int = 1,
        batch_size: int = 32,
        names: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Ask for the best of all documents in one list.

        Args:
            query: What is asked.
            documents: Candidates in the order in which they are numbered.
            permutations: Orders to ask in, each a shift of the given one; the log-probabilities are averaged.
            batch_size: Prompts per forward pass. Defaults to 32.
            names: What messages call the documents. Defaults to "document 0", ...

        Returns:
            np.ndarray: float32 logits of shape (documents,).

        Raises:
            BadImageError: If an image cannot be read.
            ValueError: If the list is longer than the tokenizer can number or the model takes.
            FloatingPointError: If a logit is not finite.
        """
        orders = rotations(len(documents), permutations)
        with evaluating(self.model):
            try:
                found = self.lists(query, [[documents[index] for index in order] for order in orders], batch_size)
            except PromptTooLongError as error:
                names = names or [f"document {index}" for index in range(len(documents))]
                longest = max(range(len(documents)), key=lambda index: len(documents[index].text or ""))
                raise PromptTooLongError(
                    f"a list of {len(documents)}, in which {names[longest]} has the longest text: {error}, or ask about "
                    "fewer documents at once (a smaller window)"
                ) from error
        _finite(torch.from_numpy(np.concatenate(found)), self.model)
        if len(orders) == 1:
            return found[0]
        scores = np.zeros(len(documents), dtype=np.float32)
        for order, logits in zip(orders, found, strict=True):
            scores[order] += torch.from_numpy(logits).log_softmax(0).numpy() / len(orders)
        return scores

    def _in_windows(
        self,
        query: Item,
        documents: Sequence[Offer],
        reasons: list[ValueError | None],
        window: int,
        permutations: int,
        batch_size: int,
        names: Sequence[str],
    ) -> Scored:
        """Probability of each document to be the best, from lists of at most ``window`` or what can be numbered."""
        indices = _indices(documents, reasons)
        distinct = list(indices)
        scores = np.zeros(len(documents), dtype=np.float64)
        if not distinct:
            return scores, reasons
        most = longest_list(self.model.tokenizer, min(window, len(distinct)))
        if len(distinct) > 1 and most < 2:
            raise ValueError(
                "this tokenizer has no usable index tokens, so it cannot rank a list: use method='pairwise'."
            )

        def score(members: list[int]) -> np.ndarray:
            called = [names[indices[distinct[member]][0]] for member in members]
            return self.listwise(query, [distinct[member] for member in members], permutations, batch_size, called)

        _, logits = slide(len(distinct), max(most, 1), score)
        for document, probability in zip(distinct, torch.from_numpy(logits).softmax(0).tolist(), strict=True):
            scores[indices[document]] = probability
        return scores, reasons


def ranked(scores: np.ndarray, reasons: Sequence[ValueError | None]) -> Ranking:
    """Sort documents by their scores; what cannot be read comes last, with its reason under "error".

    Args:
        scores: Score of each document.
        reasons: Why a document cannot be read, else None.

    Returns:
        list[dict]: ``{"corpus_id": int, "score": float}``, best first.

    Example:
        >>> import numpy as np
        >>> from unime_st.reranking.ranker import ranked
        >>> [entry["corpus_id"] for entry in ranked(np.array([0.1, 0.7]), [None, None])]
        [1, 0]
    """
    ranking: Ranking = []
    for index in sorted(range(len(scores)), key=lambda index: (reasons[index] is not None, -scores[index])):
        entry: dict[str, Any] = {"corpus_id": index, "score": float(scores[index])}
        if reasons[index] is not None:
            logger.warning("document %d is ranked last: %s", index, reasons[index])
            entry["error"] = str(reasons[index])
        ranking.append(entry)
    return ranking


def _indices(documents: Sequence[Offer], reasons: Sequence[ValueError | None]) -> dict[Item, list[int]]:
    """Where each distinct readable document stands."""
    indices: dict[Item, list[int]] = {}
    for index, document in enumerate(documents):
        if reasons[index] is None and isinstance(document, Item):
            indices.setdefault(document, []).append(index)
    return indices


def _finite(values: torch.Tensor, model: CrossEncoder) -> Any:
    if not torch.isfinite(values).all():
        raise FloatingPointError(
            f"the logits are {values.tolist()} (dtype {model.dtype}); load in bfloat16 or float32"
        )
    return values.item() if values.ndim == 0 else values
