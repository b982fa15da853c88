"""Model actors: the embedding model with its index, and the reranker, as deployments of Ray Serve."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from unime_st.data.items import Item
from unime_st.serving.batcher import Batcher
from unime_st.serving.settings import CHUNK, ServeSettings

if TYPE_CHECKING:  # the gateway imports this file, and no torch
    from sentence_transformers import SentenceTransformer

_BATCH = 4 * CHUNK
"""Items that are given to the encoding engine at once; it splits them by its token budget."""


@dataclass(frozen=True)
class EmbedCall:
    """Items to embed with one instruction; ``prompt_name`` is that of a prompt of the model."""

    items: list[Item]
    prompt: str | None = None
    prompt_name: str | None = None


@dataclass(frozen=True)
class SearchCall:
    """A query to an index; ``query_prompt`` None is the one of the index."""

    query: Item
    k: int
    query_prompt: str | None = None


@dataclass(frozen=True)
class RerankCall:
    """A query with its documents."""

    query: Item
    documents: list[Item]


@dataclass
class Answer:
    """Result of a call.

    Args:
        vectors: Embeddings, float32 of shape (items, dim).
        scores: Scores of documents in their order.
        hits: Results of a search: id, similarity and item.
        tokens: Number of tokens.
        batch: Number of calls that were computed together.
        reasons: Why items, by their indices, have no vector or score; -1 is the query.
    """

    vectors: np.ndarray | None = None
    scores: list[float] = field(default_factory=list)
    hits: list[tuple[str, float, Item]] = field(default_factory=list)
    tokens: int = 0
    batch: int = 1
    reasons: dict[int, str] = field(default_factory=dict)


class Embedder:
    """Embeds items, and searches the index.

    A model or index that cannot be loaded is reported by :meth:`info`: an actor that fails is started again.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.error: str | None = None
        self._lock = Lock()
        self.embed_batch = Batcher(self._embed, size=lambda call: len(call.items), limit=_BATCH)
        self.search_batch = Batcher(self._search, size=lambda call: 1, limit=CHUNK)
        try:
            self._load(settings)
        except (ValueError, OSError, ImportError) as error:
            self.error = f"{error}"

    def _load(self, settings: ServeSettings) -> None:
        from unime_st.encoding import TokenCounter
        from unime_st.model import UniME
        from unime_st.retrieval import Index

        _configure_process(settings.threads)
        self.model = UniME(settings.model, device=settings.device)
        self.index = None if settings.index is None else Index.load(settings.index, self.model)
        self.counter = lru_cache(maxsize=32)(lambda prompt: TokenCounter(self.model, prompt))
        self.dim = int(self.model.get_embedding_dimension() or 0)
        self.max_tokens = settings.max_tokens or _max_tokens(self.model)
        self._embed([EmbedCall([Item("warm-up")])])

    async def info(self) -> dict[str, object]:
        """Facts of the model: dimension, names of prompts, size of the index; "error" if it could not be loaded."""
        if self.error is not None:
            return {"error": self.error}
        size = None if self.index is None else len(self.index)
        return {"dim": self.dim, "prompts": sorted(self.model.prompts), "index": size}

    async def embed(self, call: EmbedCall) -> Answer:
        """Embed items."""
        return await self.embed_batch(call)

    async def search(self, call: SearchCall) -> Answer:
        """Search the index."""
        return await self.search_batch(call)

    def _embed(self, calls: Sequence[EmbedCall]) -> list[Answer]:
        answers = [Answer(batch=len(calls)) for _ in calls]
        prompts = [call.prompt if call.prompt_name is None else self.model.prompts[call.prompt_name] for call in calls]
        with self._lock:
            for prompt in dict.fromkeys(prompts):
                members = [index for index, own in enumerate(prompts) if own == prompt]
                items = list(chain.from_iterable(calls[index].items for index in members))
                tokens, reasons = self._measured(items, prompt)
                kept = [row for row in range(len(items)) if row not in reasons]
                vectors = np.full((len(items), self.dim), np.nan, dtype=np.float32)
                vectors[kept], failed = self._encode([items[row] for row in kept], prompt)
                reasons |= {kept[row]: reason for row, reason in failed.items()}
                start = 0
                for index in members:
                    end = start + len(calls[index].items)
                    own = {row - start: reason for row, reason in reasons.items() if start <= row < end}
                    answers[index].vectors, answers[index].reasons = vectors[start:end], own
                    answers[index].tokens = int(tokens[start:end].sum())
                    start = end
        return answers

    def _encode(self, items: list[Item], prompt: str | None) -> tuple[np.ndarray, dict[int, str]]:
        """Vectors, and why items have none. What the model itself refuses is found by halving: others go on."""
        from unime_st.encoding import encode_items

        reasons: dict[int, str] = {}
        try:
            return encode_items(self.model, items, prompt=prompt, on_error="skip", reasons=reasons)[0], reasons
        except Exception as error:
            if len(items) < 2:
                reason = f"the model refuses it ({type(error).__name__})"
                return np.full((len(items), self.dim), np.nan, dtype=np.float32), {0: reason}
        half = len(items) // 2
        (left, reasons), (right, others) = self._encode(items[:half], prompt), self._encode(items[half:], prompt)
        return np.concatenate([left, right]), reasons | {row + half: reason for row, reason in others.items()}

    def _measured(self, items: Sequence[Item], prompt: str | None) -> tuple[np.ndarray, dict[int, str]]:
        """Number of tokens of items, and why some are refused: one that is too long would hold up all others."""
        from unime_st.encoding.encode import resolve_prompt

        try:
            counter = self.counter(resolve_prompt(self.model, prompt))
        except Exception as error:  # it holds the token of an image, for instance
            reason = f"the model refuses the prompt: {error}"
            return np.zeros(len(items), dtype=np.int64), dict.fromkeys(range(len(items)), reason)
        tokens = counter(items)
        long = {
            int(row): f"{tokens[row]} tokens, expected at most {self.max_tokens}"
            for row in np.flatnonzero(tokens > self.max_tokens)
        }
        return tokens, long

    def _search(self, calls: Sequence[SearchCall]) -> list[Answer]:
        from unime_st.reranking.parsing import image_error

        assert self.index is not None  # the gateway has checked it
        answers = [Answer(batch=len(calls)) for _ in calls]
        with self._lock:
            for call, answer in zip(calls, answers, strict=True):
                if (error := image_error(call.query)) is not None:
                    answer.reasons[-1] = str(error)
                elif long := self._measured([call.query], call.query_prompt or "")[1]:
                    answer.reasons[-1] = long[0]
            good = [index for index, answer in enumerate(answers) if not answer.reasons]
            for prompt in dict.fromkeys(calls[index].query_prompt for index in good):
                members = [index for index in good if calls[index].query_prompt == prompt]
                most = max(1, min(max(calls[index].k for index in members), len(self.index)))
                try:
                    found = self.index.search([calls[index].query for index in members], most, query_prompt=prompt)
                except ValueError as error:
                    if len(calls) > 1:  # the batcher finds the call by calling again
                        raise
                    return [Answer(reasons={-1: str(error)})]
                for index, hits in zip(members, found, strict=True):
                    answers[index].hits = [(hit.id, hit.similarity, hit.item) for hit in hits[: calls[index].k]]
        return answers


class Reranker:
    """Scores documents for queries, see :class:`Embedder`."""

    def __init__(self, settings: ServeSettings) -> None:
        self.error: str | None = None
        self.batch = Batcher(self._score, size=lambda call: len(call.documents), limit=_BATCH)
        try:
            from unime_st.reranking import UniMEReranker

            _configure_process(settings.threads)
            self.model = UniMEReranker(settings.reranker, device=settings.device)
            self._score([RerankCall(Item("warm-up"), [Item("warm-up")])])
        except (ValueError, OSError, ImportError) as error:
            self.error = f"{error}"

    async def info(self) -> dict[str, object]:
        """Empty; "error" if the model could not be loaded."""
        return {} if self.error is None else {"error": self.error}

    async def rerank(self, call: RerankCall) -> Answer:
        """Score documents."""
        return await self.batch(call)

    def _score(self, calls: Sequence[RerankCall]) -> list[Answer]:
        from unime_st.reranking.parsing import image_error

        answers = [Answer(batch=len(calls)) for _ in calls]
        for call, answer in zip(calls, answers, strict=True):
            if (error := image_error(call.query)) is not None:
                answer.reasons[-1] = str(error)
        good = [index for index, answer in enumerate(answers) if not answer.reasons]
        try:
            found = self.model.ranker().pairwise([(calls[index].query, calls[index].documents) for index in good])
        except Exception as error:
            if len(calls) > 1:  # the batcher finds the call by calling again
                raise
            return [Answer(reasons={-1: f"the model refuses it or one of its documents ({type(error).__name__})"})]
        for index, (log_odds, reasons) in zip(good, found, strict=True):
            answers[index].scores = (1 / (1 + np.exp(-log_odds.astype(np.float64)))).tolist()
            answers[index].reasons = {row: str(reason) for row, reason in enumerate(reasons) if reason is not None}
        return answers


def _max_tokens(model: SentenceTransformer) -> int:
    """Largest number of tokens that a model takes."""
    config = getattr(model[0], "config", None)
    text = getattr(config, "text_config", config)
    limits = (getattr(text, "max_position_embeddings", None), getattr(model.tokenizer, "model_max_length", None))
    return int(min(limit for limit in (*limits, 1 << 20) if limit))


def _configure_process(threads: int) -> None:
    """Set the number of threads, and log errors only: warnings of the engine name inputs."""
    import torch

    torch.set_num_threads(threads)
    logging.getLogger("unime_st").setLevel(logging.ERROR)
