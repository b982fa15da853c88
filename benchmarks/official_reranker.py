"""The protocol of the authors' code, for comparison: generate an answer, and search it for a number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from sentence_transformers.util import batch_to_device

from unime_st.losses.list_answers import LIST_ANSWER_START
from unime_st.scoring.pair_scorer import evaluation_mode

if TYPE_CHECKING:
    from unime_st.reranking.unime_reranker import UniMEReranker

_NUMBER = re.compile(r"\((\d+)\)")


@dataclass(frozen=True)
class Choice:
    """What a model named the best.

    Args:
        answer: The generated text.
        index: The candidate it names, from 0; None where it names none of them, which the authors count as a miss.
    """

    answer: str
    index: int | None


def choose(reranker: UniMEReranker, query: Any, documents: Sequence[Any], *, max_new_tokens: int = 128) -> Choice:
    """Generate the answer to a list as the authors do: greedily, and read "(k)" out of it.

    For comparison with published numbers only: it gives neither scores nor an order beyond the winner, and takes as
    many forward passes as the answer has tokens. Unlike in the authors' code, "(0)" names no candidate (there it is the
    last).

    Args:
        reranker: The model.
        query: Item, text, image or dict.
        documents: Candidates in the order in which they are numbered.
        max_new_tokens: Bound of the answer. Defaults to the authors' 128.

    Returns:
        Choice: The text and the candidate.

    Raises:
        ValueError: If there are no candidates, or the prompt is longer than the model takes.

    References:
        UniME-V2 (https://arxiv.org/abs/2510.13515), "UniME-V2-Reranker", inference; evaluation code of its authors.

    Example:
        >>> from unime_st import UniMEReranker
        >>> from official_reranker import choose
        >>> reranker = UniMEReranker("unime-tiny", template="tiny")
        >>> isinstance(choose(reranker, "a red square", ["a blue circle", "a red square"]).answer, str)
        True
    """
    features = batch_to_device(reranker.preprocess_lists([query], [documents], share=False), reranker.device)
    # The answer begins behind the header of the turn, not behind what our prompts put in its mouth.
    begun = len(reranker.tokenizer.encode(LIST_ANSWER_START, add_special_tokens=False))
    inputs = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            inputs[name] = inputs[name][:, :-begun]
    inputs.pop("num_images_per_sample", None)
    with evaluation_mode(reranker):
        model = cast(Any, reranker[0]).model
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answer = reranker.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    named = _NUMBER.search(str(answer))
    index = int(named.group(1)) - 1 if named else -1
    return Choice(str(answer), index if 0 <= index < len(documents) else None)
