"""List scorer: scores of all candidates of a list, from the logits at the position where its answer begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import batch_to_device
from transformers import PreTrainedTokenizerBase

from unime_st.backbones.video_frames import raise_without_video
from unime_st.data import Item
from unime_st.encoding.input_videos import has_video
from unime_st.losses.list_answers import append_tokens, index_answers
from unime_st.scoring.chat_tokenizer import check_length
from unime_st.scoring.pair_scorer import PairScorer
from unime_st.scoring.prompt_encoder import readable_images
from unime_st.scoring.prompts import conversation

_GAP = 1e-3  # between the last of a window and what was left behind, in logits

Answers = Sequence[tuple[int, ...]]


def list_logits(logits: torch.Tensor, continued: torch.Tensor, answers: Answers) -> np.ndarray:
    """Scores of candidates from the logits behind a list, float32 of shape (candidates,).

    Their softmax is the probability of each answer among all. Answers that begin with the same token, as 1 and 10 in
    Qwen's tokenizers, share the probability of that token, by the logits ``continued`` behind it of their second
    tokens.

    Example:
        >>> import torch
        >>> from unime_st.scoring.list_scorer import list_logits
        >>> list_logits(torch.zeros(2), torch.zeros(2), [(5,), (6,)]).tolist()
        [0.0, 0.0]
    """
    scores = logits.clone().float()
    for token in {answer[0] for answer in answers if len(answer) > 1}:
        members = [number for number, answer in enumerate(answers) if answer[0] == token]
        scores[members] += continued[members].float().log_softmax(0)
    return scores.numpy()


class ListScorer:
    """Scores all candidates of a list from the logits behind one prompt.

    It shares what the pair scorer of the same module shares: each image passes the vision tower once, the query the
    language model once. Where that cannot share (``scorer.obstacle``), lists do not, either, nor do lists with a video.
    """

    def __init__(self, transformer: Transformer, scorer: PairScorer) -> None:
        self.transformer = transformer
        self.scorer = scorer

    def __call__(self, query: Item, lists: Sequence[Sequence[Item]], batch_size: int = 32) -> list[np.ndarray]:
        """Score the candidates of lists, in the order of their numbers, for one query; see :func:`list_logits`.

        Raises:
            BadImageError: If an image cannot be read.
            ValueError: If a prompt is longer than the model takes, or a list longer than the tokenizer can number.
        """
        tokenizer = cast(PreTrainedTokenizerBase, self.transformer.tokenizer)
        answers = [index_answers(tokenizer, len(documents)) for documents in lists]
        token_ids = sorted({token for listed in answers for answer in listed for token in answer})
        column = {token: index for index, token in enumerate(token_ids)}
        prompts: list[_ListPrompt] = []
        for number, listed in enumerate(answers):
            first_digits = dict.fromkeys(answer[0] for answer in listed if len(answer) > 1)
            prompts += [_ListPrompt(number, token) for token in (None, *first_digits)]
        shared = self.scorer.obstacle is None and self.scorer.prompts is not None and self.scorer.prompts.query_first
        if has_video((query, *lists)):
            raise_without_video(self.transformer.processor)
            shared = False
        if shared:
            logits = self._shared(query, lists, prompts, token_ids, batch_size)
        else:
            logits = [self._alone(query, lists[prompt.number], prompt.token, token_ids) for prompt in prompts]
        found = dict(zip(prompts, logits, strict=True))
        scores = []
        for number, listed in enumerate(answers):
            first = found[_ListPrompt(number)][[column[answer[0]] for answer in listed]]
            second = torch.tensor(
                [
                    float(found[_ListPrompt(number, answer[0])][column[answer[1]]]) if len(answer) > 1 else 0.0
                    for answer in listed
                ]
            )
            scores.append(list_logits(first, second, listed))
        return scores

    def _shared(
        self,
        query: Item,
        lists: Sequence[Sequence[Item]],
        prompts: Sequence[_ListPrompt],
        token_ids: list[int],
        batch_size: int,
    ) -> list[torch.Tensor]:
        """Logits behind each prompt, with shared prefixes."""
        encoder, engine = self.scorer.prompts, self.scorer.engine
        assert encoder is not None and engine is not None
        rows = [self._tokenize(query, documents) for documents in lists]
        keys = [
            encoder.images.keys([item.image for item in (query, *documents) if item.image is not None])
            for documents in lists
        ]
        encoded = encoder.images.encode_images(key for row in keys for key in row)
        images = [readable_images([encoded[key] for key in row]) for row in keys]
        for row, shown in zip(rows, images, strict=True):
            encoder.check(row, shown, continuation=1)  # the first digit of an answer
        # Lists of one query share a prefix; a list and its continuations share all but the last token.
        continued = any(prompt.token is not None for prompt in prompts)
        by_prefix: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_prefix.setdefault(prompt.number if continued else 0, []).append(index)
        members = [([*rows[number], *([] if token is None else [token])], images[number]) for number, token in prompts]
        groups = [encoder.group([members[index] for index in indices]) for indices in by_prefix.values()]
        answers = engine.logits(groups, token_ids, batch_size=batch_size)
        ordered: dict[int, torch.Tensor] = {}
        for indices, block in zip(by_prefix.values(), answers, strict=True):
            ordered.update(zip(indices, block, strict=True))
        return [ordered[index] for index in range(len(prompts))]

    def _tokenize(self, query: Item, documents: Sequence[Item]) -> list[int]:
        """Token ids of a list's prompt with one placeholder for each image."""
        assert self.scorer.prompts is not None
        messages = conversation(query, documents, decode=False)
        prompt = self.transformer.processor.apply_chat_template(messages, tokenize=False, task="listwise")
        return self.scorer.prompts.tokenizer.tokenize([str(prompt)])[0]

    def _alone(self, query: Item, documents: Sequence[Item], token: int | None, token_ids: list[int]) -> torch.Tensor:
        """Logits behind a prompt from the model's own forward."""
        features = self.transformer.preprocess(
            [conversation(query, documents)], task="listwise", processing_kwargs={"text": {"truncation": False}}
        )
        if token is not None:
            append_tokens(features, [token])
        check_length(self.transformer, features["input_ids"].shape[1])
        outputs = self.transformer(batch_to_device(features, self.transformer.model.device))
        return outputs["causal_logits"][0, -1, token_ids].float().cpu()


class _ListPrompt(NamedTuple):
    """The prompt of a list, continued with the first digit of an answer where there is one."""

    number: int
    token: int | None = None


def rotations(count: int, number: int) -> list[list[int]]:
    """Orders in which to show candidates: ``number`` shifts by as even a step as possible, at most ``count``.

    Example:
        >>> from unime_st.scoring.list_scorer import rotations
        >>> rotations(3, 2)
        [[0, 1, 2], [1, 2, 0]]
    """
    shifts = [turn * count // number for turn in range(number)] if number < count else range(count)
    return [[(index + shift) % count for index in range(count)] for shift in shifts]


def sliding_window(count: int, window: int, score: Callable[[list[int]], np.ndarray]) -> tuple[list[int], np.ndarray]:
    """Rank more candidates than a list holds: a window moves from the back to the front by half its length.

    The better half of a window is part of the next one, so the best of all candidates reach the front.

    Args:
        count: Number of candidates, the most promising first.
        window: Maximum length of a list, at least 2.
        score: Returns the logits of some candidates in one list.

    Returns:
        tuple: The ranking, and a logit for each candidate that falls along it. The logits of a window are shifted so
        that candidates of the window before keep their mean, and stay above all that were left behind.

    References:
        Sun et al., "Is ChatGPT Good at Search?" (https://arxiv.org/abs/2304.09542), sliding windows.

    Example:
        >>> import numpy as np
        >>> from unime_st.scoring.list_scorer import sliding_window
        >>> sliding_window(5, 2, lambda members: np.array(members, dtype=float))[0][0]
        4
    """
    step = max(1, window // 2)
    order = list(range(count))
    logits = np.full(count, -np.inf)
    start, end = max(0, count - window), count
    while True:
        members = order[start:end]
        found = score(members).astype(np.float64)
        known = np.isfinite(logits[members])
        shift = float((logits[members][known] - found[known]).mean()) if known.any() else 0.0
        if end < count:
            shift = max(shift, float(logits[order[end:]].max() - found.min()) + _GAP)
        logits[members] = found + shift
        order[start:end] = sorted(members, key=lambda member: -logits[member])
        if start == 0:
            return order, logits
        end = start + window - step
        start = max(0, start - step)
