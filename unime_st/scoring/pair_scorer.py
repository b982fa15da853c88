"""Logits of a few answers to every pair of a query and a candidate, with as little computing as the model allows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import batch_to_device

from unime_st.data import Item
from unime_st.scoring.prefix import Bundle, PrefixEngine
from unime_st.scoring.prompt_encoder import Pair, ProcessorEncoder, PromptEncoder

logger = logging.getLogger(__name__)

Query = tuple[Item, Sequence[Item]]
Outcome = torch.Tensor | ValueError

# Prompts are sorted by length within this many batches: enough to waste little on padding, few enough to hold.
_BATCHES_SORTED_TOGETHER = 16
_BATCHES_PREPARED_TOGETHER = 4
_PROBE_TOKENS = 256


class PairScorer:
    """Scores candidates of queries with a generative vision-language model.

    What the prompts of a query have in common passes the language model once, every image passes the vision tower once
    (:class:`~unime_st.scoring.prefix.PrefixEngine`). Whether a model allows that is tried once, on a made-up query;
    where it does not, every pair is computed on its own, which is logged as a warning.

    Args:
        transformer: Input module with a chat template processor.
        template: Jinja source of the chat template.
        token_ids: Tokens whose logits are wanted.
        options: Passed to the image processor. Defaults to the module's own.
        batch_size: Pairs per forward pass. Defaults to 32.
        cache_bytes: Bound of the memory for visual tokens, in bytes. Defaults to 256 MiB.

    Attributes:
        parts, engine: What makes prompts of parts and runs them; whole lists of candidates go through them, too.
        obstacle: Why prompts of one query do not share their beginning; None if they do.

    Example:
        >>> from unime_st import Item, UniMEReranker
        >>> from unime_st.scoring.pair_scorer import PairScorer
        >>> reranker = UniMEReranker("unime-tiny", template="tiny")
        >>> scorer = PairScorer(reranker[0], reranker[0].processor.chat_template, [reranker[-1].true_token_id])
        >>> outcomes = scorer.score([(Item("a red square"), [Item("a red square"), Item("a blue circle")])])
        >>> [logits.shape for pair, logits in outcomes]
        [torch.Size([1]), torch.Size([1])]
    """

    def __init__(
        self,
        transformer: Transformer,
        template: str,
        token_ids: Sequence[int],
        *,
        options: dict[str, Any] | None = None,
        batch_size: int = 32,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.transformer = transformer
        self.token_ids = list(token_ids)
        self.batch_size = batch_size
        self.cache_bytes = cache_bytes
        self._whole = ProcessorEncoder(transformer, template, options or {})
        self.parts: PromptEncoder | None = None
        self.engine: PrefixEngine | None = None
        self.obstacle: str | None = None
        try:
            self.engine = PrefixEngine(transformer.model, transformer.processor.image_token_id)
            self.parts = PromptEncoder(transformer, template, options or {}, cache_bytes)
            if not self.parts.query_first:
                logger.warning("the template shows the candidate before the query, so prompts share little")
            self._probe()
        except Exception as error:  # whatever an unknown family raises, the slow way remains
            self.obstacle = f"{type(error).__name__}: {error}"
            logger.warning(
                "%s: every pair is computed on its own, because its beginning cannot be shared (%s)",
                type(transformer.model).__name__,
                self.obstacle,
            )

    def clear(self) -> None:
        """Forget the images seen so far."""
        if self.parts is not None:
            self.parts.bank.clear()

    @property
    def language_weights(self) -> int:
        """Weights of the language model that every token meets; 0 where they are not known."""
        if self.engine is None:
            return 0
        tables = sum(weight.numel() for weight in self.engine.decoder.get_input_embeddings().parameters())
        return sum(weight.numel() for weight in self.engine.decoder.parameters()) - tables

    def tokens(self, queries: Sequence[Query]) -> tuple[int, int]:
        """Count tokens through the language model.

        Args:
            queries: Queries, each with its distinct candidates.

        Returns:
            tuple[int, int]: With shared beginnings, and if every pair were computed on its own. (0, 0) where the model
            has to compute every pair on its own.
        """
        if self.obstacle is not None or self.parts is None:
            return 0, 0
        bundles = [bundle for bundle, _ in self.parts.encode(queries)[0]]
        ends = sum(len(suffix) for bundle in bundles for suffix in bundle.suffixes)
        begins = [(len(bundle.prefix), len(bundle.suffixes)) for bundle in bundles]
        return ends + sum(length for length, _ in begins), ends + sum(length * times for length, times in begins)

    @torch.inference_mode()
    def score(self, queries: Sequence[Query], batch_size: int | None = None) -> Iterator[tuple[Pair, Outcome]]:
        """Score pairs in any order.

        Args:
            queries: Queries, each with its distinct candidates.
            batch_size: Pairs per forward pass. Defaults to None: that of the scorer.

        Yields:
            tuple: A pair, and float32 logits of shape (tokens,) or the error that keeps it from being scored.
        """
        batch_size = batch_size or self.batch_size
        if self.obstacle is None:
            yield from self._shared(queries, batch_size)
            return
        pairs = [(query, candidate) for query, candidates in queries for candidate in candidates]
        window = _BATCHES_SORTED_TOGETHER * batch_size
        for start in range(0, len(pairs), window):
            part = sorted(pairs[start : start + window], key=_size, reverse=True)
            for first in range(0, len(part), batch_size):
                yield from self._alone(part[first : first + batch_size])

    def _shared(self, queries: Sequence[Query], batch_size: int) -> Iterator[tuple[Pair, Outcome]]:
        assert self.parts is not None
        window: list[tuple[Bundle, list[Pair]]] = []
        for part in _portions(queries, _BATCHES_PREPARED_TOGETHER * batch_size):
            bundles, failed = self.parts.encode(part)
            yield from failed
            window += bundles
            prompts = sum(len(pairs) for _, pairs in window)
            if len(window) >= batch_size or prompts >= _BATCHES_SORTED_TOGETHER * batch_size:
                yield from self._run(window, batch_size)
                window = []
        yield from self._run(window, batch_size)

    def _run(self, window: list[tuple[Bundle, list[Pair]]], batch_size: int) -> Iterator[tuple[Pair, torch.Tensor]]:
        assert self.engine is not None
        answers = self.engine.logits([bundle for bundle, _ in window], self.token_ids, batch_size=batch_size)
        for (_, pairs), found in zip(window, answers, strict=True):
            yield from zip(pairs, found, strict=True)

    def _alone(self, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, Outcome]]:
        """Score pairs with the model's own forward; halve a batch until the pair that fails stands alone."""
        try:
            logits = self._forward(pairs, self.token_ids)
        except ValueError as error:
            if len(pairs) == 1:
                yield pairs[0], error
                return
            yield from self._alone(pairs[: len(pairs) // 2])
            yield from self._alone(pairs[len(pairs) // 2 :])
            return
        yield from zip(pairs, logits, strict=True)

    def _forward(self, pairs: Sequence[Pair], token_ids: Sequence[int]) -> torch.Tensor:
        features = batch_to_device(self._whole.features(pairs), self.transformer.model.device)
        features["logits_to_keep"] = 1
        return self.transformer(features)["causal_logits"][:, -1, list(token_ids)].float().cpu()

    @torch.inference_mode()
    def _probe(self) -> None:
        """Refuse to share what changes the answers, for reasons that only the model knows."""
        assert self.parts is not None and self.engine is not None
        first, second = (Image.linear_gradient("L").resize(size).convert("RGB") for size in ((90, 60), (60, 120)))
        query = Item("Which of these is it?", first)
        candidates = [Item("It is a red square."), Item(image=second), Item("A circle", second)]
        (vocabulary,) = self.transformer.model.get_output_embeddings().weight.shape[:1]
        tokens = range(0, vocabulary, max(1, vocabulary // _PROBE_TOKENS))
        training = self.transformer.training
        self.transformer.eval()
        try:
            bundles, failed = self.parts.encode([(query, candidates)])
            if failed:
                raise failed[0][1]
            found = torch.cat(self.engine.logits([bundle for bundle, _ in bundles], tokens))
            pairs = [pair for _, members in bundles for pair in members]
            expected = torch.cat([self._forward([pair], tokens) for pair in pairs])
        finally:
            self.transformer.train(training)
            self.clear()
        scale = (expected - expected.mean(1, keepdim=True)).norm()
        difference = float((found - expected).norm() / scale)
        # NaN is a broken model, not another way of computing: it is reported when something is scored.
        allowed = 1e-3 if self.transformer.model.dtype == torch.float32 else 0.15
        if difference > allowed:
            raise ValueError(f"the logits of a made-up query change by {difference:.2g} of their spread")


def _portions(queries: Sequence[Query], pairs: int) -> Iterator[list[Query]]:
    """Cut queries into lists of about so many pairs; a query with more is cut, too."""
    portion: list[Query] = []
    room = pairs
    for query, candidates in queries:
        for start in range(0, len(candidates), pairs):
            part = candidates[start : start + pairs]
            portion.append((query, part))
            room -= len(part)
            if room <= 0:
                yield portion
                portion, room = [], pairs
    if portion:
        yield portion


def _size(pair: Pair) -> tuple[int, int]:
    return sum(item.image is not None for item in pair), sum(len(item.text or "") for item in pair)
