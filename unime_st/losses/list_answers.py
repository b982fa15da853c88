"""List answers: the tokens of the candidate numbers in a listwise prompt, and the cross entropy over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

LIST_ANSWER_START = "Ans: ("
"""End of a listwise prompt; the number of the best candidate follows."""


def check_list_prompt(processor: Any, chat: Sequence[Mapping[str, object]], **options: str) -> None:
    """Check that a chat template has a listwise prompt, and would not silently render a list as a pair.

    ``chat`` holds the messages of a query and two candidates, the second one with the text "second"; ``options`` are
    those of ``apply_chat_template``.

    Raises:
        ValueError: If the template has no listwise prompt.
    """

    def render(**task: str) -> str:
        return str(processor.apply_chat_template(chat, tokenize=False, **options, **task))

    prompt = render(task="listwise")
    if prompt == render() or not prompt.endswith(LIST_ANSWER_START) or "second" not in prompt:
        raise ValueError(
            "The chat template has no listwise prompt: with task='listwise' it must number the candidates and end with "
            f"{LIST_ANSWER_START!r}. Load the model with UniMEReranker(folder, template='official'), rank and train "
            "pairwise (listwise_weight=0), or read that template for an example."
        )


def index_answers(tokenizer: PreTrainedTokenizerBase, count: int) -> list[tuple[int, ...]]:
    """Tokens that distinguish the answers "Ans: (1)", ..., "Ans: (count)".

    For each number they are the fewest tokens after "Ans: (" that distinguish it from the others: one, or two where
    the tokenizer splits numbers into digits and another number begins alike, as 1 and 10 do.

    Raises:
        ValueError: If the tokenizer cannot write the numbers, or needs more than two tokens to distinguish them.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from unime_st.losses.list_answers import index_answers
        >>> index_answers(AutoTokenizer.from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct"), 10)[:2]  # doctest: +SKIP
        [(16, 8), (17,)]
    """
    if count < 1:
        raise ValueError(f"a list needs at least 1 candidate, got {count}")
    start = tokenizer.encode(LIST_ANSWER_START, add_special_tokens=False)
    written: list[tuple[int, ...]] = []
    for number in range(1, count + 1):
        ids = tokenizer.encode(f"{LIST_ANSWER_START}{number})", add_special_tokens=False)
        if ids[: len(start)] != start or tokenizer.unk_token_id in ids[len(start) :] or len(ids) == len(start):
            tokens = tokenizer.convert_ids_to_tokens(ids)
            raise ValueError(
                f"this tokenizer has no usable index tokens: it splits {LIST_ANSWER_START + str(number) + ')'!r} into "
                f"{tokens}. Rank pairwise (method='pairwise'), or train with listwise_weight=0."
            )
        written.append(tuple(ids[len(start) :]))
    answers = [_shortest(number, written) for number in range(count)]
    longest = max(map(len, answers))
    if longest > 2:
        raise ValueError(
            f"{count} candidates cannot share a list: this tokenizer needs {longest} tokens to distinguish their "
            f"numbers. At most {longest_list(tokenizer, count - 1)} can; rank them in windows of that size."
        )
    return answers


def _shortest(number: int, written: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The fewest first tokens of a number that no other number begins with."""
    own = written[number]
    for length in range(1, len(own)):
        if sum(other[:length] == own[:length] for other in written) == 1:
            return own[:length]
    return own


def longest_list(tokenizer: PreTrainedTokenizerBase, wanted: int) -> int:
    """Most candidates of a list, up to ``wanted``, whose numbers :func:`index_answers` can tell apart; 0 if none."""
    for count in (wanted, *(limit for limit in (99, 9) if limit < wanted)):
        try:
            index_answers(tokenizer, count)
        except ValueError:
            continue
        return count
    return 0


def second_positions(weights: Tensor, answers: Sequence[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """Rows of the lists that may have an answer of two tokens, and for each the first token of the answer.

    ``weights`` (rows, positions) is the probability of each position of each list to be the answer.

    Example:
        >>> import torch
        >>> from unime_st.losses.list_answers import second_positions
        >>> second_positions(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), [(5, 9), (6,), (5, 4)])
        ([1], [5])
    """
    rows, tokens = [], []
    for token in dict.fromkeys(answer[0] for answer in answers if len(answer) > 1):
        members = [number for number, answer in enumerate(answers) if answer[0] == token]
        found = weights[:, members].sum(1).nonzero()[:, 0].tolist()
        rows += found
        tokens += [token] * len(found)
    return rows, tokens


def answer_cross_entropy(logits: Sequence[Tensor], weights: Tensor, answers: Sequence[tuple[int, ...]]) -> Tensor:
    """Cross entropy of list answers, token by token: -log P(10) = -log P(1) - log P(0 | 1); the mean over the rows.

    Args:
        logits: Logits after the lists, ``(rows, vocab)``, and after those of :func:`second_positions` with their first
            token appended, ``(len(second_positions), vocab)``.
        weights: Probability of each position of each list to be the answer, ``(rows, positions)``.
        answers: Result of :func:`index_answers`.

    Example:
        >>> import torch
        >>> from unime_st.losses.list_answers import answer_cross_entropy
        >>> answer_cross_entropy([torch.zeros(1, 4)], torch.tensor([[0.0, 1.0]]), [(2,), (3,)])
        tensor(1.3863)
    """
    weights = weights.to(logits[0].dtype)
    first = torch.tensor([answer[0] for answer in answers], device=weights.device)
    loss = -(weights * logits[0].log_softmax(-1)[:, first]).sum()
    for index, (row, token) in enumerate(zip(*second_positions(weights, answers), strict=True)):
        members = [number for number, answer in enumerate(answers) if len(answer) > 1 and answer[0] == token]
        second = torch.tensor([answers[number][1] for number in members], device=weights.device)
        loss = loss - (weights[row, members] * logits[1][index].log_softmax(-1)[second]).sum()
    return loss / len(weights)


def append_tokens(features: dict[str, Tensor], tokens: Sequence[int]) -> None:
    """Append a token to each left-padded prompt of a batch of features, in place.

    Example:
        >>> import torch
        >>> from unime_st.losses.list_answers import append_tokens
        >>> features = {"input_ids": torch.tensor([[0, 7]]), "attention_mask": torch.tensor([[0, 1]])}
        >>> append_tokens(features, [9])
        >>> features["input_ids"].tolist(), features["attention_mask"].tolist()
        ([[0, 7, 9]], [[0, 1, 1]])
    """
    for name, value in (("input_ids", tokens), ("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in features:
            column = features[name].new_zeros(len(tokens), 1) + torch.as_tensor(value).view(-1, 1)
            features[name] = torch.cat([features[name], column], 1)
