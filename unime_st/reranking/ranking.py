"""From a query and its documents to a ranking with scores: pairwise, listwise, and first one, then the other."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modality import is_image_url_or_path
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore

from unime_st.data import BadImageError, Item
from unime_st.judging.prompts import as_item
from unime_st.judging.scoring import PairScorer
from unime_st.losses.list_answers import longest_list
from unime_st.reranking.lists import ListScorer, rotations, slide

logger = logging.getLogger(__name__)

UNREADABLE = -1e4
"""Log-odds of a document whose image cannot be read: below all others, and a number."""

Ranking = list[dict[str, Any]]


def to_item(value: Any) -> Item:
    """Turn an input of ``rank`` into an item; a text that names an existing image file is that image.

    Args:
        value: Item, text, Pillow image or dict of them.

    Returns:
        Item: The same content.

    Raises:
        TypeError: If the value is something else.
        ValueError: If nothing is in it.

    Example:
        >>> from unime_st.reranking.ranking import to_item
        >>> to_item("a red square").modality
        'text'
    """
    if isinstance(value, str) and is_image_url_or_path(value) and os.path.isfile(value):
        return Item(image=value)
    if isinstance(value, Image.Image):
        return Item(image=_as_it_is(value))
    if isinstance(value, dict) and isinstance(value.get("image"), Image.Image):
        value = {**value, "image": _as_it_is(value["image"])}
    if isinstance(value, dict) and isinstance(value.get("image"), str) and not os.path.isfile(value["image"]):
        raise TypeError("an image that is fetched is no item")
    return as_item(value)


def _as_it_is(image: Image.Image) -> Image.Image:
    """An opened RGB image without what its file says about orientation: ``predict`` and the authors take its pixels."""
    if image.mode == "RGB":
        image = image.copy()
        image.info = {}
    return image


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off for a while.

    Args:
        model: What is used.
    """
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


class Ranker:
    """Ranks documents with the judge's engine: every picture is seen once, the query passes once.

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

    def pairwise(
        self, query: Item, documents: Sequence[Item], batch_size: int = 32
    ) -> tuple[np.ndarray, list[str | None]]:
        """Ask Yes or No about each document.

        Args:
            query: What is asked.
            documents: What might meet it; equal ones are asked about once.
            batch_size: Prompts per forward pass. Defaults to 32.

        Returns:
            tuple: float32 log-odds of shape (documents,), :data:`UNREADABLE` where an image cannot be read, and per
            document why, else None.

        Raises:
            BadImageError: If the query's image cannot be read.
            ValueError: If a prompt is longer than the model takes.
            FloatingPointError: If a logit is not finite.
        """
        reasons = _unreadable(query, documents, decode=False)
        places = _places(documents, reasons)
        scores = np.full(len(documents), UNREADABLE, dtype=np.float32)
        self.pairs.batch_size = batch_size
        with evaluating(self.model):
            for (_, document), outcome in self.pairs.score([(query, list(places))]):
                if isinstance(outcome, BadImageError):
                    for place in places[document]:
                        reasons[place] = str(outcome)
                    continue
                if isinstance(outcome, ValueError):
                    raise outcome
                scores[places[document]] = _finite(outcome[0] - outcome[1], self.model)
        return scores, reasons

    def listwise(self, query: Item, documents: Sequence[Item], permutations: int = 1) -> np.ndarray:
        """Ask for the best of all documents in one list.

        Args:
            query: What is asked.
            documents: Candidates in the order in which they are numbered.
            permutations: Orders to ask in, each a shift of the given one; the log-probabilities are averaged.

        Returns:
            np.ndarray: float32 logits of shape (documents,).

        Raises:
            BadImageError: If an image cannot be read.
            ValueError: If the list is longer than the tokenizer can number or the model takes.
            FloatingPointError: If a logit is not finite.
        """
        orders = rotations(len(documents), permutations)
        with evaluating(self.model):
            found = self.lists(query, [[documents[place] for place in order] for order in orders])
        _finite(torch.from_numpy(np.concatenate(found)), self.model)
        if len(orders) == 1:
            return found[0]
        scores = np.zeros(len(documents), dtype=np.float32)
        for order, logits in zip(orders, found, strict=True):
            scores[order] += torch.from_numpy(logits).log_softmax(0).numpy() / len(orders)
        return scores

    def in_windows(
        self, query: Item, documents: Sequence[Item], window: int, permutations: int = 1
    ) -> tuple[np.ndarray, list[str | None]]:
        """Rank any number of documents by lists of at most ``window``.

        Args:
            query: What is asked.
            documents: Candidates, the most promising first; equal ones stand in the lists once.
            window: Most candidates of a list; fewer where the tokenizer cannot number so many.
            permutations: See :meth:`listwise`.

        Returns:
            tuple: Probability of each document to be the best, 0 where an image cannot be read, and per document why.
        """
        reasons = _unreadable(query, documents, decode=True)
        places = _places(documents, reasons)
        distinct = list(places)
        scores = np.zeros(len(documents), dtype=np.float64)
        if not distinct:
            return scores, reasons
        most = longest_list(self.model.tokenizer, min(window, len(distinct)))
        if len(distinct) > 1 and most < 2:
            raise ValueError(
                "this tokenizer has no usable index tokens, so it cannot rank a list: use method='pairwise'."
            )

        def score(members: list[int]) -> np.ndarray:
            return self.listwise(query, [distinct[member] for member in members], permutations)

        _, logits = slide(len(distinct), max(most, 1), score)
        for document, probability in zip(distinct, torch.from_numpy(logits).softmax(0).tolist(), strict=True):
            scores[places[document]] = probability
        return scores, reasons


def ranked(scores: np.ndarray, reasons: Sequence[str | None]) -> Ranking:
    """Sort documents by their scores; what cannot be read comes last, with its reason under "error".

    Args:
        scores: Score of each document.
        reasons: Why a document cannot be read, else None.

    Returns:
        list[dict]: ``{"corpus_id": int, "score": float}``, best first.

    Example:
        >>> import numpy as np
        >>> from unime_st.reranking.ranking import ranked
        >>> [entry["corpus_id"] for entry in ranked(np.array([0.1, 0.7]), [None, None])]
        [1, 0]
    """
    ranking: Ranking = []
    for place in sorted(range(len(scores)), key=lambda place: (reasons[place] is not None, -scores[place])):
        entry: dict[str, Any] = {"corpus_id": place, "score": float(scores[place])}
        if reasons[place] is not None:
            logger.warning("document %d is ranked last: %s", place, reasons[place])
            entry["error"] = reasons[place]
        ranking.append(entry)
    return ranking


def hybrid(
    ranker: Ranker, query: Item, documents: Sequence[Item], window: int, permutations: int, batch_size: int
) -> tuple[np.ndarray, list[str | None]]:
    """Ask about each document, then for the best of those that did best.

    Args:
        ranker: What answers.
        query: What is asked.
        documents: Candidates.
        window: How many go into the list.
        permutations: See :meth:`Ranker.listwise`.
        batch_size: Prompts per forward pass.

    Returns:
        tuple: Scores, 1 + P(best of the list) for documents of the list and P(Yes) for the others, and per document
        why it cannot be read.
    """
    log_odds, reasons = ranker.pairwise(query, documents, batch_size)
    scores = torch.from_numpy(log_odds).double().sigmoid().numpy()
    readable = [place for place in range(len(documents)) if reasons[place] is None]
    best = sorted(readable, key=lambda place: -log_odds[place])[:window]
    if len(best) > 1:
        listed, _ = ranker.in_windows(query, [documents[place] for place in best], window, permutations)
        scores[best] = 1.0 + listed
    return scores, reasons


def _unreadable(query: Item, documents: Sequence[Item], *, decode: bool) -> list[str | None]:
    """Why documents cannot be read, as far as that shows before a model runs; the query must be readable."""
    if query.image is not None:
        query.image.open()
    reasons: list[str | None] = []
    for document in documents:
        try:
            if decode and document.image is not None:
                document.image.open()
            hash(document)  # of the content, which is read for it
            reasons.append(None)
        except BadImageError as error:
            reasons.append(str(error))
    return reasons


def _places(documents: Sequence[Item], reasons: Sequence[str | None]) -> dict[Item, list[int]]:
    """Where each distinct readable document stands."""
    places: dict[Item, list[int]] = {}
    for place, document in enumerate(documents):
        if reasons[place] is None:
            places.setdefault(document, []).append(place)
    return places


def _finite(values: torch.Tensor, model: CrossEncoder) -> Any:
    if not torch.isfinite(values).all():
        raise FloatingPointError(
            f"the logits are {values.tolist()} (dtype {model.dtype}); load in bfloat16 or float32"
        )
    return values.item() if values.ndim == 0 else values
