"""Local judge: log-odds of a model's Yes against its No, computed in this process."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from sentence_transformers import CrossEncoder
from transformers import PreTrainedTokenizerBase

from unime_st.compat import hub_commit
from unime_st.data import Item
from unime_st.encoding import weights_fingerprint
from unime_st.scoring.groups import Group, PairError, PairOrder, orders_of
from unime_st.scoring.loading import (
    ImageTokens,
    default_image_tokens,
    generative_parts,
    image_size_limits,
    load_cross_encoder,
)
from unime_st.scoring.pair_scorer import PairScorer, score_pairs
from unime_st.scoring.prompts import (
    LEAST_ANSWER_SHARE,
    NO_ANSWER_ADVICE,
    check_template,
    load_template,
    prompt_hash,
)

logger = logging.getLogger(__name__)


class LocalJudge:
    """Judges pairs with a generative vision-language model in this process.

    The score is ``l_Yes - l_No``, the difference of the logits at the first answer position, in float32 and before any
    temperature or repetition penalty; ``sigmoid(score)`` is the ``s`` of the paper.

    Args:
        model: Folder, hub repository or alias of a generative vision-language model or a saved reranker, or a loaded
            ``CrossEncoder`` with a ``LogitScore`` module.
        template: Name or text of the chat template, see :func:`~unime_st.judging.load_template`. Defaults to that of a
            saved reranker, else "tiny" for "unime-tiny" and "official" for other checkpoints.
        batch_size: Pairs per forward pass. Defaults to 32.
        device: Such as "cuda:0". Defaults to the choice of sentence-transformers.
        image_tokens: Minimum and maximum number of visual tokens per image. Defaults to those of the template (4 to
            300 for "official"), else to the limits of the model's own image processor.
        cache_bytes: Upper bound of the memory for visual tokens of images seen before, in bytes. Defaults to 256 MiB.
        max_text_tokens: Truncate the texts of items to this many tokens; truncations are counted in ``shortened`` and
            logged. Defaults to None: nothing is truncated, and a prompt longer than the model takes is an error of its
            pair.
        pair_order: Order of the two items in the prompt: "query_first", "candidate_first" (exchanged) or "both" (the mean
            of the two log-odds, at twice the cost). A judge may be blind in one order and good in the other:
            :func:`~unime_st.judging.calibration.calibrate` measures it. Defaults to "query_first", the paper's order.
        model_kwargs: Passed to ``from_pretrained`` when a model is loaded, for example ``{"dtype": "bfloat16"}``.
        name: Name of this judge in manifests. Defaults to the last part of the model's name.
        show_progress_bar: Whether to show progress in pairs. Defaults to False.

    Attributes:
        name, revision, prompt_hash: See :class:`~unime_st.judging.Judge`; the revision is the hub's commit or a hash
            of the weights.
        shortened: Number of texts truncated so far, counted per call and item.
        answer_share: Probability of Yes and No together at the answer position, mean over the pairs of the first call;
            None before. Below 1 % the ratio of the two is not an answer, which is logged as a warning.

    Raises:
        ValueError: If the model is not generative, the template drops a part of its input, or the pair order is unknown.

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
        pair_order: PairOrder = "query_first",
        model_kwargs: Mapping[str, object] | None = None,
        name: str | None = None,
        show_progress_bar: bool = False,
    ) -> None:
        orders_of(pair_order)
        if isinstance(model, (str, Path)):
            name = name or Path(model).name
            model = load_cross_encoder(
                model, template=template, image_tokens=image_tokens, device=device, model_kwargs=model_kwargs
            )
        elif device is not None:
            model.to(device)
        self.model = model
        transformer, answer_ids = generative_parts(self.model)
        processor = transformer.processor
        source = processor.chat_template if template is None else load_template(template)
        check_template(processor, source)
        size = image_size_limits(processor, image_tokens or default_image_tokens(processor, template))
        options = {**transformer.processing_kwargs.get("image", {}), **({} if size is None else {"size": size})}
        self.show_progress_bar = show_progress_bar
        self.scorer = PairScorer(
            transformer, source, answer_ids, image_options=options, batch_size=batch_size, cache_bytes=cache_bytes
        )
        self.name = name or Path(transformer.config.name_or_path or "model").name
        self.revision = hub_commit(transformer.config) or weights_fingerprint(self.model)
        tokenizer = cast(PreTrainedTokenizerBase, transformer.tokenizer)
        answers = tokenizer.convert_ids_to_tokens(answer_ids)
        cut = [] if max_text_tokens is None else [max_text_tokens]
        self._template, self._prompt_options = source, (answers, sorted(options.items()), *cut)
        self._set_order(pair_order)
        self.max_text_tokens = max_text_tokens
        self.shortened = 0
        self.answer_share: float | None = None

    def _set_order(self, pair_order: PairOrder) -> None:
        self.pair_order = pair_order
        # The hash of the paper's order is that of scores which were stored before there was a choice.
        order = [] if pair_order == "query_first" else [pair_order]
        self.prompt_hash = prompt_hash(self._template, *self._prompt_options, *order)

    def in_order(self, pair_order: PairOrder) -> LocalJudge:
        """Return this judge, with the same model, for another order of the two items.

        Example:
            >>> from unime_st.judging import LocalJudge
            >>> LocalJudge("unime-tiny", template="tiny").in_order("both").pair_order
            'both'
        """
        orders_of(pair_order)
        other = copy.copy(self)
        other._set_order(pair_order)
        return other

    def count_tokens(self, groups: Sequence[Group]) -> tuple[int, int]:
        """Count tokens as :meth:`~unime_st.scoring.pair_scorer.PairScorer.count_tokens`, in the order of this judge."""
        queries = [(group.query, group.candidates) for group in groups]
        turned: dict[Item, list[Item]] = {}
        for query, candidates in queries if self.pair_order != "query_first" else ():
            for candidate in candidates:
                turned.setdefault(candidate, []).append(query)
        counts = [self.scorer.count_tokens(queries)] if self.pair_order != "candidate_first" else []
        counts += [self.scorer.count_tokens(list(turned.items()))] if turned else []
        return sum(count[0] for count in counts), sum(count[1] for count in counts)

    def score(self, groups: Sequence[Group], *, errors: list[PairError] | None = None) -> list[np.ndarray]:
        """Score every candidate of every group, see :meth:`~unime_st.judging.Judge.score`; equal pairs count once.

        A pair cannot be judged if its image is unreadable or its prompt longer than the model takes.

        Raises:
            BadImageError: If an image cannot be read and ``errors`` is None; the message names group and candidate.
            ValueError: If a prompt is longer than the model takes and ``errors`` is None.
            FloatingPointError: If a logit is not finite.
        """
        shares: list[float] | None = [] if self.answer_share is None else None
        found = score_pairs(
            self.scorer,
            [(group.query, group.candidates) for group in self._shorten(groups)],
            raise_errors=errors is None,
            answer_shares=shares,
            pair_order=self.pair_order,
            description="Judging",
            show_progress_bar=self.show_progress_bar,
        )
        if shares:
            self.answer_share = float(np.mean(shares))
            if self.answer_share < LEAST_ANSWER_SHARE:
                logger.warning("%s: %s.", self.name, NO_ANSWER_ADVICE)
        if errors is not None:
            errors += [
                PairError(row, column, str(reason))
                for row, scored in enumerate(found)
                for column, reason in enumerate(scored.reasons)
                if reason is not None
            ]
        return [scored.scores for scored in found]

    def _shorten(self, groups: Sequence[Group]) -> Sequence[Group]:
        """Truncate long texts."""
        limit, before = self.max_text_tokens, self.shortened
        if limit is None:
            return groups
        tokenizer = cast(PreTrainedTokenizerBase, self.scorer.transformer.tokenizer)

        def cut(item: Item) -> Item:
            if item.text is None or len(item.text.encode("utf-8", "replace")) < limit:  # a token has a byte at least
                return item
            ends = tokenizer(item.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            if len(ends) <= limit:
                return item
            self.shortened += 1
            # A character may take several tokens; one that does not fit as a whole is dropped.
            return Item(item.text[: min(ends[limit - 1][1], ends[limit][0])], item.image, item.video)

        shorter = [Group(cut(group.query), [cut(candidate) for candidate in group.candidates]) for group in groups]
        if self.shortened > before:
            logger.warning("%s: %d texts truncated to %d tokens", self.name, self.shortened - before, limit)
        return shorter
