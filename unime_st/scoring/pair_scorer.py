"""Pair scorer: logits of a few answers to every pair of a query and a candidate, and the log-odds made of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import batch_to_device
from torch import nn
from tqdm.auto import tqdm

from unime_st.data import BadImageError, Item
from unime_st.encoding.input_videos import has_video
from unime_st.options import check_count
from unime_st.scoring.groups import PairOrder, orders_of
from unime_st.scoring.prefix import PrefixEngine, PromptGroup
from unime_st.scoring.prompt_encoder import Pair, PromptEncoder, Query, WholePromptEncoder

logger = logging.getLogger(__name__)

Outcome = torch.Tensor | ValueError
"""Logits of the answers to a pair, or the reason why it cannot be scored."""

# Prompts are sorted by length within this many batches: enough to waste little on padding, few enough to hold.
_BATCHES_SORTED_TOGETHER = 16
_BATCHES_PREPARED_TOGETHER = 4
_PROBE_TOKENS = 256


class PairScores(NamedTuple):
    """Scores of the candidates of one query, NaN where there is a reason why a candidate has none."""

    scores: np.ndarray
    reasons: list[ValueError | None]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch off dropout and gradients for a block, and restore the training mode of every module behind it.

    Example:
        >>> layer = nn.Dropout().train()
        >>> with evaluation_mode(layer):
        ...     layer.training
        False
        >>> layer.training
        True
    """
    # Switching all modules of a small model twice would take a tenth of the time of a list.
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


class PairScorer:
    """Scores the candidates of queries with a generative vision-language model.

    The common prefix of a query's prompts passes the language model once, and every image passes the vision tower once
    (:class:`~unime_st.scoring.prefix.PrefixEngine`). Whether a model allows that is tried once, on a made-up query.
    Where it does not, every pair is computed by itself, which is logged as a warning; so is every pair with a video.

    Args:
        transformer: Input module with a chat template processor.
        template: Jinja source of the chat template.
        token_ids: Tokens whose logits are computed.
        image_options: Options of the image processor. Defaults to those of the module.
        batch_size: Pairs per forward pass.
        cache_bytes: Upper bound of the memory for visual tokens, in bytes.

    Attributes:
        prompts, engine: Prompt encoder and shared-prefix engine; the list scorer uses them, too. None where the model
            does not allow sharing.
        obstacle: Reason why prompts do not share their prefix, None if they do.

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
        image_options: dict[str, object] | None = None,
        batch_size: int = 32,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        check_count("batch_size", batch_size)
        self.transformer = transformer
        self.token_ids = list(token_ids)
        self.batch_size = batch_size
        if image_options is None:
            image_options = dict(transformer.processing_kwargs.get("image", {}))
        self.whole_prompts = WholePromptEncoder(transformer, template, image_options)
        self.prompts: PromptEncoder | None = None
        self.engine: PrefixEngine | None = None
        self.obstacle: str | None = None
        try:
            self.engine = PrefixEngine(transformer.model, transformer.processor.image_token_id)
            self.prompts = PromptEncoder(transformer, template, image_options, cache_bytes)
            if not self.prompts.query_first:
                logger.warning("the template shows the candidate before the query, so prompts share little")
            self._probe()
        except Exception as error:  # whatever an unknown family raises, the slow way remains
            self.obstacle = f"{type(error).__name__}: {error}"
            logger.warning(
                "%s: every pair is computed by itself, because its prefix cannot be shared (%s)",
                type(transformer.model).__name__,
                self.obstacle,
            )

    def clear(self) -> None:
        """Forget the images seen so far."""
        if self.prompts is not None:
            self.prompts.images.clear()

    @property
    def language_weights(self) -> int:
        """Weights of the language model that every token passes; 0 where they are not known."""
        if self.engine is None:
            return 0
        tables = sum(weight.numel() for weight in self.engine.decoder.get_input_embeddings().parameters())
        return sum(weight.numel() for weight in self.engine.decoder.parameters()) - tables

    def count_tokens(self, queries: Sequence[Query]) -> tuple[int, int]:
        """Count the tokens that pass the language model: with shared prefixes, and with every pair computed by itself.

        (0, 0) where the model does not allow sharing.
        """
        if self.obstacle is not None or self.prompts is None:
            return 0, 0
        queries, with_video = _apart(queries)
        alone = sum(int(self.whole_prompts.features([pair])["attention_mask"].sum()) for pair in with_video)
        groups = [group for group, _ in self.prompts.encode(queries)[0]]
        suffixes = sum(len(suffix) for group in groups for suffix in group.suffixes)
        shared = sum(len(group.prefix) for group in groups)
        unshared = sum(len(group.prefix) * len(group.suffixes) for group in groups)
        return alone + suffixes + shared, alone + suffixes + unshared

    @torch.inference_mode()
    def score(
        self, queries: Sequence[Query], batch_size: int | None = None, *, with_total: bool = False
    ) -> Iterator[tuple[Pair, Outcome]]:
        """Score pairs in any order.

        Args:
            queries: Queries with their distinct candidates.
            batch_size: Pairs per forward pass. Defaults to that of the scorer.
            with_total: Append the log-sum-exp of the logits of the whole vocabulary.

        Yields:
            A pair, and float32 logits of shape (tokens,) or the reason why it cannot be scored.
        """
        batch_size = batch_size or self.batch_size
        if self.obstacle is None:
            queries, with_video = _apart(queries)
            yield from self._shared(queries, batch_size, with_total)
            for pair in with_video:
                yield from self._alone([pair], with_total)
            return
        pairs = [(query, candidate) for query, candidates in queries for candidate in candidates]
        window = _BATCHES_SORTED_TOGETHER * batch_size
        for start in range(0, len(pairs), window):
            part = sorted(pairs[start : start + window], key=_size, reverse=True)
            for first in range(0, len(part), batch_size):
                yield from self._alone(part[first : first + batch_size], with_total)

    def _shared(self, queries: Sequence[Query], batch_size: int, with_total: bool) -> Iterator[tuple[Pair, Outcome]]:
        assert self.prompts is not None
        window: list[tuple[PromptGroup, list[Pair]]] = []
        for part in _portions(queries, _BATCHES_PREPARED_TOGETHER * batch_size):
            groups, failed = self.prompts.encode(part)
            yield from failed
            window += groups
            prompts = sum(len(pairs) for _, pairs in window)
            if len(window) >= batch_size or prompts >= _BATCHES_SORTED_TOGETHER * batch_size:
                yield from self._run(window, batch_size, with_total)
                window = []
        yield from self._run(window, batch_size, with_total)

    def _run(
        self, window: list[tuple[PromptGroup, list[Pair]]], batch_size: int, with_total: bool
    ) -> Iterator[tuple[Pair, torch.Tensor]]:
        assert self.engine is not None
        groups = [group for group, _ in window]
        answers = self.engine.logits(groups, self.token_ids, batch_size=batch_size, with_total=with_total)
        for (_, pairs), found in zip(window, answers, strict=True):
            yield from zip(pairs, found, strict=True)

    def _alone(self, pairs: Sequence[Pair], with_total: bool) -> Iterator[tuple[Pair, Outcome]]:
        """Score pairs with the model's own forward; halve a batch until the pair that fails stands alone."""
        try:
            logits = self._forward(pairs, self.token_ids, with_total)
        except ValueError as error:
            if len(pairs) == 1:
                yield pairs[0], error
                return
            yield from self._alone(pairs[: len(pairs) // 2], with_total)
            yield from self._alone(pairs[len(pairs) // 2 :], with_total)
            return
        yield from zip(pairs, logits, strict=True)

    def _forward(self, pairs: Sequence[Pair], token_ids: Sequence[int], with_total: bool = False) -> torch.Tensor:
        """Logits of some tokens from the model's own forward."""
        features = batch_to_device(self.whole_prompts.features(pairs), self.transformer.model.device)
        features["logits_to_keep"] = 1
        logits = self.transformer(features)["causal_logits"][:, -1]
        total = [logits.float().logsumexp(-1, keepdim=True)] if with_total else []
        return torch.cat([logits[:, list(token_ids)].float(), *total], 1).cpu()

    def _probe(self) -> None:
        """Raise an error if sharing changes the answers, for reasons that only the model knows."""
        assert self.prompts is not None and self.engine is not None
        first, second = (Image.linear_gradient("L").resize(size).convert("RGB") for size in ((90, 60), (60, 120)))
        query = Item("Which of these is it?", first)
        candidates = [Item("It is a red square."), Item(image=second), Item("A circle", second)]
        (vocabulary,) = self.transformer.model.get_output_embeddings().weight.shape[:1]
        tokens = range(0, vocabulary, max(1, vocabulary // _PROBE_TOKENS))
        with evaluation_mode(self.transformer):
            groups, failed = self.prompts.encode([(query, candidates)])
            if failed:
                raise failed[0][1]
            found = torch.cat(self.engine.logits([group for group, _ in groups], tokens))
            pairs = [pair for _, members in groups for pair in members]
            expected = torch.cat([self._forward([pair], tokens) for pair in pairs])
        self.clear()
        scale = (expected - expected.mean(1, keepdim=True)).norm()
        difference = float((found - expected).norm() / scale)
        # NaN is a broken model, not another way of computing: it is reported when something is scored.
        allowed = 1e-3 if self.transformer.model.dtype == torch.float32 else 0.15
        if difference > allowed:
            raise ValueError(f"the logits of a made-up query change by {difference:.2g} of their spread")


def score_pairs(
    scorer: PairScorer,
    queries: Sequence[Query],
    *,
    batch_size: int | None = None,
    raise_errors: bool = False,
    answer_shares: list[float] | None = None,
    pair_order: PairOrder = "query_first",
    description: str = "Scoring",
    show_progress_bar: bool = False,
) -> list[PairScores]:
    """Log-odds of Yes against No for the candidates of queries; each distinct pair is scored once.

    Args:
        scorer: Scorer of the two answers, Yes first.
        queries: Queries with their candidates, which may repeat.
        batch_size: Pairs per forward pass. Defaults to that of the scorer.
        raise_errors: Raise the reason of the first pair that cannot be scored, with group and candidate in the message,
            instead of returning it.
        answer_shares: List that collects the probability of Yes and No together among the whole vocabulary, one number
            per distinct pair. Defaults to None: it is not computed.
        pair_order: "candidate_first" asks with query and candidate exchanged, "both" averages the log-odds of the two
            orders. Prompts share the item that comes first. Defaults to "query_first", the paper's order.
        description: Label of the progress bar.
        show_progress_bar: Whether to show progress in pairs.

    Raises:
        FloatingPointError: If a logit is not finite.

    Example:
        >>> from unime_st import Item
        >>> from unime_st.judging import LocalJudge
        >>> from unime_st.scoring.pair_scorer import score_pairs
        >>> scorer = LocalJudge("unime-tiny", template="tiny").scorer
        >>> scores, reasons = score_pairs(scorer, [(Item("a red square"), [Item("a red square"), Item("a star")])])[0]
        >>> scores.shape, reasons
        ((2,), [None, None])
    """
    if len(orders := orders_of(pair_order)) > 1:
        options: dict[str, Any] = {"batch_size": batch_size, "raise_errors": raise_errors}
        options |= {"description": description, "show_progress_bar": show_progress_bar, "answer_shares": answer_shares}
        ways = [score_pairs(scorer, queries, pair_order=order, **options) for order in orders]
        return [_mean(*own) for own in zip(*ways, strict=True)]
    found = [
        PairScores(np.full(len(candidates), np.nan, dtype=np.float32), [None] * len(candidates))
        for _, candidates in queries
    ]

    def fail(row: int, column: int, error: ValueError) -> None:
        if raise_errors:
            raise type(error)(f"group {row}, candidate {column}: {error}") from error
        found[row].reasons[column] = error

    cells: dict[Item, dict[Item, list[tuple[int, int]]]] = {}
    for row, (query, candidates) in enumerate(queries):
        for column, candidate in enumerate(candidates):
            try:
                first, second = (query, candidate) if pair_order == "query_first" else (candidate, query)
                cells.setdefault(first, {}).setdefault(second, []).append((row, column))
            except BadImageError as error:  # the content that makes items equal cannot be read
                fail(row, column, error)
    with (
        evaluation_mode(scorer.transformer),
        tqdm(
            total=sum(map(len, cells.values())), desc=description, unit="pair", disable=not show_progress_bar
        ) as progress,
    ):
        distinct = [(first, list(others)) for first, others in cells.items()]
        for (first, second), outcome in scorer.score(distinct, batch_size, with_total=answer_shares is not None):
            if answer_shares is not None and isinstance(outcome, torch.Tensor):
                answer_shares.append(float((outcome[:2] - outcome[2]).exp().sum()))
            for row, column in cells[first][second]:
                if isinstance(outcome, ValueError):
                    fail(row, column, outcome)
                else:
                    # Subtracted in float32: a bfloat16 difference of two logits near 20 would move in steps of 0.125.
                    found[row].scores[column] = _finite(outcome[0] - outcome[1], row, column, scorer)
            progress.update()
    return found


def _mean(first: PairScores, second: PairScores) -> PairScores:
    """Mean of the log-odds of both orders; NaN, with the reason, where one of them has none."""
    reasons = [one or other for one, other in zip(first.reasons, second.reasons, strict=True)]
    return PairScores((first.scores + second.scores) / 2, reasons)


def _finite(log_odds: torch.Tensor, row: int, column: int, scorer: PairScorer) -> float:
    if not torch.isfinite(log_odds):
        raise FloatingPointError(
            f"group {row}, candidate {column}: the log-odds are {float(log_odds)}, so the model overflowed or is broken "
            f"(dtype {scorer.transformer.model.dtype}). Load it in bfloat16 or float32."
        )
    return float(log_odds)


def _portions(queries: Sequence[Query], pairs: int) -> Iterator[list[Query]]:
    """Cut queries into lists of about so many pairs; a query with more of them is cut, too."""
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


def _apart(queries: Sequence[Query]) -> tuple[list[Query], list[Pair]]:
    """Queries with their candidates without videos, and the pairs with a video."""
    pairs = [(query, candidate) for query, candidates in queries for candidate in candidates]
    with_video = list(filter(has_video, pairs))
    if not with_video:
        return list(queries), []
    plain = [(query, [one for one in candidates if not has_video((query, one))]) for query, candidates in queries]
    return [(query, candidates) for query, candidates in plain if candidates], with_video


def _size(pair: Pair) -> tuple[int, int]:
    media = sum(part is not None for item in pair for part in (item.image, item.video))
    return media, sum(len(item.text or "") for item in pair)
