"""Scores of all candidates of a list from the logits where its answer begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.modules import Transformer

from unime_st.data import Item
from unime_st.losses.list_answers import append_tokens, index_answers
from unime_st.scoring.pair_scorer import PairScorer
from unime_st.scoring.prefix import ImageFeatures
from unime_st.scoring.prompt_encoder import check_length
from unime_st.scoring.prompts import conversation

_GAP = 1e-3  # between the last of a window and what was left behind, in logits

Answers = Sequence[tuple[int, ...]]


def list_logits(logits: torch.Tensor, continued: torch.Tensor, answers: Answers) -> np.ndarray:
    """Read the scores of candidates from the logits behind a list.

    Args:
        logits: Behind "Ans: (", of the first token of each answer, ``(candidates,)``.
        continued: Behind the first token, of the second token of each answer that has two; else unused.
        answers: Result of :func:`~unime_st.losses.list_answers.index_answers`.

    Returns:
        np.ndarray: float32 of shape (candidates,). Their softmax is the probability of each answer among all; where 1
        and 10 begin alike, they share what their first token has.

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
    """Answers lists with what the judge's engine shares: each image is seen once, the query passes once.

    Args:
        transformer: Input module with a chat template that knows lists.
        scorer: The judge's scorer of the same module; where it shares nothing (``scorer.obstacle``), lists do not.

    Example:
        See :meth:`unime_st.UniMEReranker.listwise_scores`, which uses it.
    """

    def __init__(self, transformer: Transformer, scorer: PairScorer) -> None:
        self.transformer = transformer
        self.scorer = scorer

    def __call__(self, query: Item, lists: Sequence[Sequence[Item]], batch_size: int = 32) -> list[np.ndarray]:
        """Score the candidates of lists for one query.

        Args:
            query: What is asked.
            lists: Candidates in the order in which they are numbered.
            batch_size: Prompts per forward pass. Defaults to 32.

        Returns:
            list[np.ndarray]: Per list float32 logits, see :func:`list_logits`.

        Raises:
            BadImageError: If an image cannot be read.
            ValueError: If a prompt is longer than the model takes, or a list longer than the tokenizer can number.
        """
        tokenizer: Any = self.transformer.tokenizer
        answers = [index_answers(tokenizer, len(documents)) for documents in lists]
        token_ids = sorted({token for listed in answers for answer in listed for token in answer})
        column = {token: index for index, token in enumerate(token_ids)}
        prompts: list[tuple[int, int | None]] = []  # the list, and what its prompt is continued with
        for number, listed in enumerate(answers):
            begun = dict.fromkeys(answer[0] for answer in listed if len(answer) > 1)
            prompts += [(number, token) for token in (None, *begun)]
        found = dict(zip(prompts, self._logits(query, lists, prompts, token_ids, batch_size), strict=True))
        scores = []
        for number, listed in enumerate(answers):
            first = found[number, None][[column[answer[0]] for answer in listed]]
            second = torch.tensor(
                [float(found[number, answer[0]][column[answer[1]]]) if len(answer) > 1 else 0.0 for answer in listed]
            )
            scores.append(list_logits(first, second, listed))
        return scores

    def _logits(
        self,
        query: Item,
        lists: Sequence[Sequence[Item]],
        prompts: list[tuple[int, int | None]],
        token_ids: list[int],
        batch_size: int,
    ) -> list[torch.Tensor]:
        """Logits of some tokens behind each list, or behind a list and the first token of an answer."""
        parts, engine = self.scorer.parts, self.scorer.engine
        if self.scorer.obstacle is not None or parts is None or engine is None or not parts.query_first:
            return [self._alone(query, lists[number], token, token_ids) for number, token in prompts]
        rows = [self._row(query, documents) for documents in lists]
        keys = [
            [
                (item.image, 1 + sum(d.image is not None for d in documents) if parts.bank.together_matters else 1)
                for item in (query, *documents)
                if item.image is not None
            ]
            for documents in lists
        ]
        if parts.bank.together_matters and query.image is None:
            keys = [[(image, together - 1) for image, together in row] for row in keys]
        seen = parts.bank.look(key for row in keys for key in row)
        for image in seen.values():
            if isinstance(image, ValueError):
                raise image
        images: list[list[ImageFeatures]] = [[seen[key] for key in row] for row in keys]  # type: ignore[misc]
        for row, shown in zip(rows, images, strict=True):
            check_length(self.transformer, len(row) + 1 + sum(len(image.token_ids) - 1 for image in shown))
        members = [([*rows[number], *([] if token is None else [token])], images[number]) for number, token in prompts]
        # Lists of one query share its beginning; a list and its continuations share all but the end.
        continued = any(token is not None for _, token in prompts)
        bundles: dict[int, list[int]] = {}
        for index, (number, _) in enumerate(prompts):
            bundles.setdefault(number if continued else 0, []).append(index)
        answers = engine.logits(
            [parts.bundle([members[index] for index in indices]) for indices in bundles.values()],
            token_ids,
            batch_size=batch_size,
        )
        ordered = {
            index: row
            for indices, block in zip(bundles.values(), answers, strict=True)
            for index, row in zip(indices, block)
        }
        return [ordered[index] for index in range(len(prompts))]

    def _row(self, query: Item, documents: Sequence[Item]) -> list[int]:
        """Token ids of a prompt with one placeholder for each image."""
        tokenizer: Any = self.transformer.tokenizer
        messages = conversation(query, documents, decode=False)
        prompt = str(self.transformer.processor.apply_chat_template(messages, tokenize=False, task="listwise"))
        special = not (tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token))
        return tokenizer(prompt, add_special_tokens=special, return_attention_mask=False)["input_ids"]

    def _alone(self, query: Item, documents: Sequence[Item], token: int | None, token_ids: list[int]) -> torch.Tensor:
        """The same with the model's own forward on the whole prompt."""
        features = self.transformer.preprocess(
            [conversation(query, documents)], task="listwise", processing_kwargs={"text": {"truncation": False}}
        )
        if token is not None:
            append_tokens(features, [token])
        check_length(self.transformer, features["input_ids"].shape[1])
        device = self.transformer.model.device
        inputs = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in features.items()
        }
        return self.transformer(inputs)["causal_logits"][0, -1, token_ids].float().cpu()


def rotations(count: int, number: int) -> list[list[int]]:
    """Orders in which to show candidates: shifts by as even a step as possible.

    Args:
        count: Number of candidates.
        number: Number of orders, at most ``count``; with all of them every candidate stands once at every place.

    Returns:
        list[list[int]]: Per order the candidate at each place; the first is the given order.

    Example:
        >>> from unime_st.scoring.list_scorer import rotations
        >>> rotations(3, 2)
        [[0, 1, 2], [1, 2, 0]]
    """
    shifts = [turn * count // number for turn in range(min(number, count))] if number < count else list(range(count))
    return [[(index + shift) % count for index in range(count)] for shift in shifts]


def slide(count: int, window: int, score: Callable[[list[int]], np.ndarray]) -> tuple[list[int], np.ndarray]:
    """Rank more candidates than a list holds: a window moves from the back to the front by half its length.

    The better half of a window is asked about again in the next, so the best of all come through to the front.

    Args:
        count: Number of candidates, the most promising first.
        window: Most candidates of a list, at least 2.
        score: Gives the logits of some candidates in one list.

    Returns:
        tuple: The ranking, and a logit for each candidate that falls along it: those of a window are shifted so that
        the candidates it shares with the one before keep their mean, and stay above all that were left behind.

    References:
        Sun et al., "Is ChatGPT Good at Search?" (https://arxiv.org/abs/2304.09542), sliding windows.

    Example:
        >>> import numpy as np
        >>> from unime_st.scoring.list_scorer import slide
        >>> slide(5, 2, lambda members: np.array(members, dtype=float))[0][0]
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
