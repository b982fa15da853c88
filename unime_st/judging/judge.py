"""Judging: the log-odds of a model's Yes against its No that a candidate meets a query."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from tqdm.auto import tqdm

from unime_st.compat import hub_commit
from unime_st.data import BadImageError, Item
from unime_st.encoding import weights_fingerprint
from unime_st.scoring.loading import ImageTokens, default_image_tokens, image_size_limits, load_cross_encoder
from unime_st.scoring.pair_scorer import PairScorer
from unime_st.scoring.prompts import ItemLike, as_item, check_template, load_template, prompt_hash

logger = logging.getLogger(__name__)


@dataclass(frozen=True, init=False)
class Group:
    """A query and the candidates to judge for it.

    Args:
        query: What is asked.
        candidates: What might meet it. Both are items or what :func:`~unime_st.judging.as_item` makes one of.

    Example:
        >>> from unime_st.judging import Group
        >>> len(Group("a red square", ["a red box", "a blue dot"]).candidates)
        2
    """

    query: Item
    candidates: list[Item]

    def __init__(self, query: ItemLike, candidates: Sequence[ItemLike]) -> None:
        object.__setattr__(self, "query", as_item(query))
        object.__setattr__(self, "candidates", [as_item(candidate) for candidate in candidates])


@dataclass(frozen=True)
class PairError:
    """Why a pair has no score.

    Args:
        group: Index of the group.
        candidate: Index of the candidate in its group.
        reason: One sentence.
    """

    group: int
    candidate: int
    reason: str


@runtime_checkable
class Judge(Protocol):
    """Anything that scores candidates.

    ``name``, ``revision`` and ``prompt_hash`` identify where a score comes from; scores that differ in one of them must
    not be mixed.
    """

    name: str
    revision: str
    prompt_hash: str

    def score(self, groups: Sequence[Group], *, errors: list[PairError] | None = None) -> list[np.ndarray]:
        """Score every candidate of every group.

        Args:
            groups: Queries with their candidates.
            errors: Where given, pairs that cannot be judged are appended here and scored NaN; else they raise.

        Returns:
            list[np.ndarray]: Per group a float32 array of log-odds, one per candidate in order.
        """
        ...


class LocalJudge:
    """Judge pairs with a generative vision-language model in this process.

    The score is ``l_Yes - l_No``, the difference of the logits at the first answer position, in float32 and before any
    temperature or repetition penalty; ``sigmoid(score)`` is the ``s`` of the paper.

    Args:
        model: Folder, hub repository or alias of a generative vision-language model or a saved reranker, or a loaded
            ``CrossEncoder`` with a ``LogitScore`` module.
        template: Name or text of the chat template, see :func:`~unime_st.judging.load_template`. Defaults to the one a
            saved reranker carries, else "official".
        batch_size: Pairs per forward pass. Defaults to 32.
        device: Such as "cuda:0". Defaults to what sentence-transformers picks.
        image_tokens: Fewest and most visual tokens per image. Defaults to what the template was made for (4 to 300
            for "official"), else to the limits of the model's own image processor.
        cache_bytes: Bound of the memory for the visual tokens of images seen before, in bytes. Defaults to 256 MiB.
        max_text_tokens: Texts of items are cut after so many tokens, which is counted in ``shortened`` and logged.
            Defaults to None: nothing is cut, and a prompt longer than the model takes is an error of its pair.
        model_kwargs: Passed to ``from_pretrained`` when a model is loaded, for example ``{"dtype": "bfloat16"}``.
        name: What to call this judge in manifests. Defaults to the last part of the model's name.
        show_progress_bar: Whether to show progress in pairs. Defaults to False.

    Attributes:
        name, revision, prompt_hash: See :class:`Judge`; the revision is the hub's commit or a hash over the weights.
        shortened: Texts cut so far, counted per call and item.

    Raises:
        ValueError: If the model is no generative one, or the template drops a part of its input.

    References:
        UniME-V2 (https://arxiv.org/abs/2510.13515), "MLLM-as-a-Judge", the equation of the semantic matching score.

    Example:
        >>> from unime_st.judging import Group, LocalJudge
        >>> judge = LocalJudge("unime-tiny", template="tiny")
        >>> scores = judge.score([Group("a red square", ["a red square", "a blue circle"])])
        >>> scores[0].shape, scores[0].dtype
        ((2,), dtype('float32'))
    """

    def __init__(
        self,
        model: str | Path | CrossEncoder,
        *,
        template: str | None = None,
        batch_size: int = 32,
        device: str | None = None,
        image_tokens: ImageTokens | None = None,
        cache_bytes: int = 256 * 2**20,
        max_text_tokens: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        name: str | None = None,
        show_progress_bar: bool = False,
    ) -> None:
        if isinstance(model, (str, Path)):
            name = name or Path(model).name
            model = load_cross_encoder(
                model, template=template, image_tokens=image_tokens, device=device, model_kwargs=model_kwargs
            )
        elif device is not None:
            model.to(device)
        self.model = model
        transformer, answer_ids = _generative_parts(self.model)
        processor = transformer.processor
        source = processor.chat_template if template is None else load_template(template)
        check_template(processor, source)
        size = image_size_limits(processor, image_tokens or default_image_tokens(processor, template))
        options = {**transformer.processing_kwargs.get("image", {}), **({} if size is None else {"size": size})}
        self.show_progress_bar = show_progress_bar
        self.scorer = PairScorer(
            transformer, source, answer_ids, options=options, batch_size=batch_size, cache_bytes=cache_bytes
        )
        self.name = name or Path(transformer.config.name_or_path or "model").name
        self.revision = hub_commit(transformer.config) or weights_fingerprint(self.model)
        tokenizer: Any = transformer.tokenizer
        answers = tokenizer.convert_ids_to_tokens(answer_ids)
        cut = [] if max_text_tokens is None else [max_text_tokens]
        self.prompt_hash = prompt_hash(source, answers, sorted(options.items()), *cut)
        self.max_text_tokens = max_text_tokens
        self.shortened = 0

    def score(self, groups: Sequence[Group], *, errors: list[PairError] | None = None) -> list[np.ndarray]:
        """Score every candidate of every group; each distinct pair is judged once.

        Args:
            groups: Queries with their candidates.
            errors: Where given, pairs that cannot be judged (an unreadable image, a prompt longer than the model
                takes) are appended here and scored NaN. Defaults to None: they raise.

        Returns:
            list[np.ndarray]: Per group a float32 array of log-odds, one per candidate in order; empty for a group
            without candidates.

        Raises:
            BadImageError: If an image cannot be read and ``errors`` is None; the message names group and candidate.
            ValueError: If a prompt is longer than the model takes and ``errors`` is None.
            FloatingPointError: If a logit is not finite.
        """
        groups = self._shorten(groups)
        scores = [np.full(len(group.candidates), np.nan, dtype=np.float32) for group in groups]
        indices = _distinct_pairs(groups, errors)
        queries: dict[Item, list[Item]] = defaultdict(list)
        for query, candidate in indices:
            queries[query].append(candidate)
        with (
            _evaluating(self.model),
            tqdm(total=len(indices), desc="Judging", unit="pair", disable=not self.show_progress_bar) as progress,
        ):
            for pair, outcome in self.scorer.score(list(queries.items())):
                # Subtracted in float32: a bfloat16 difference of two logits near 20 would move in steps of 0.125.
                answer = outcome if isinstance(outcome, ValueError) else float(outcome[0] - outcome[1])
                for row, column in indices[pair]:
                    if isinstance(answer, ValueError):
                        set_aside(errors, row, column, answer)
                    elif not np.isfinite(answer):
                        raise FloatingPointError(
                            f"group {row}, candidate {column}: the log-odds are {answer}, so the model overflowed "
                            f"or is broken (dtype {self.model.dtype}). Load it in bfloat16 or float32."
                        )
                    else:
                        scores[row][column] = answer
                progress.update()
        return scores

    def _shorten(self, groups: Sequence[Group]) -> Sequence[Group]:
        """Cut long texts."""
        limit, before = self.max_text_tokens, self.shortened
        if limit is None:
            return groups
        tokenizer: Any = self.scorer.transformer.tokenizer

        def cut(item: Item) -> Item:
            if item.text is None or len(item.text.encode("utf-8", "replace")) < limit:  # a token has a byte at least
                return item
            ends = tokenizer(item.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            if len(ends) <= limit:
                return item
            self.shortened += 1
            # A character may take several tokens; one that does not fit as a whole goes.
            return Item(item.text[: min(ends[limit - 1][1], ends[limit][0])], item.image)

        shorter = [Group(cut(group.query), [cut(candidate) for candidate in group.candidates]) for group in groups]
        if self.shortened > before:
            logger.warning("%s: %d texts cut after %d tokens", self.name, self.shortened - before, limit)
        return shorter


def _generative_parts(model: CrossEncoder) -> tuple[Transformer, list[int]]:
    """Return the input module and the ids of the two answers."""
    first, last = model[0], model[-1]
    if not isinstance(first, Transformer) or not isinstance(last, LogitScore) or last.false_token_id is None:
        raise ValueError(
            f"a judge needs a generative CrossEncoder, [Transformer, LogitScore(yes, no)], got "
            f"[{', '.join(type(module).__name__ for module in model)}]. Load one with UniMEReranker(folder)."
        )
    if first.processor.chat_template is None:
        raise ValueError("this CrossEncoder has no chat template: pass template='official' to UniMEReranker(folder)")
    return first, [last.true_token_id, last.false_token_id]


def _distinct_pairs(
    groups: Sequence[Group], errors: list[PairError] | None
) -> dict[tuple[Item, Item], list[tuple[int, int]]]:
    """Map each distinct pair to all places where it occurs, query-major."""
    indices: dict[tuple[Item, Item], list[tuple[int, int]]] = {}
    for row, group in enumerate(groups):
        for column, candidate in enumerate(group.candidates):
            try:
                indices.setdefault((group.query, candidate), []).append((row, column))
            except BadImageError as error:  # the content that makes items equal cannot be read
                set_aside(errors, row, column, error)
    return indices


def set_aside(errors: list[PairError] | None, group: int, candidate: int, error: ValueError) -> None:
    """Record why a pair cannot be judged, or raise it with its place.

    Args:
        errors: Where to record it; None to raise.
        group: Index of the group.
        candidate: Index of the candidate in its group.
        error: The reason.
    """
    if errors is None:
        raise type(error)(f"group {group}, candidate {candidate}: {error}") from error
    errors.append(PairError(group, candidate, str(error)))


@contextmanager
def _evaluating(model: CrossEncoder) -> Iterator[None]:
    """Switch dropout off for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
