"""Reranker loss, UniME-V2-Reranker: pairwise (Yes or No to one candidate) and listwise (number of the best one)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import CrossEncoder
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from unime_st.losses.citations import UNIME_V2_CITATION
from unime_st.losses.list_answers import (
    answer_cross_entropy,
    append_tokens,
    check_list_prompt,
    index_answers,
    second_positions,
)
from unime_st.losses.random_lists import draw_lists, evaluation_seed, list_targets, training_seed
from unime_st.options import check_count

Prompts = dict[str, Any]
"""A column of prompts: queries, their candidates and what else shapes the prompt."""


class RerankerLoss(CachedLossMixin, nn.Module):
    citation = UNIME_V2_CITATION

    mini_batch_size: int | None  # type: ignore[assignment]  # None where the cache is off

    def __init__(
        self,
        model: CrossEncoder,
        pairwise_weight: float = 1.0,
        listwise_weight: float = 1.0,
        *,
        min_list_length: int | None = None,
        target_temperature: float | None = None,
        mini_batch_size: int | None = None,
        show_progress_bar: bool = False,
    ) -> None:
        """
        Joint pairwise and listwise training of UniME-V2-Reranker. For a query q with its positive and x mined
        negatives, of which h is the hardest by the judge's score::

            pair = CE(Yes | q, positive) + CE(No | q, h)
            list = CE(k | q, the x negatives in their order with the positive inserted at position k)
            loss = mean_q (pairwise_weight * pair + listwise_weight * list)

        Each cross entropy is over the whole vocabulary at the token of the answer (two tokens where a number needs two
        to differ from another, as 10 does in Qwen's tokenizers). k is uniform over all 1 + x positions. This follows
        the paper, not the authors' code: there the position is biased, the last one never holds the positive, the loss
        also averages over header and end tokens, and no text reaches the prompt.

        Args:
            model: A ``CrossEncoder`` of ``[Transformer, LogitScore(yes, no)]`` whose chat template renders pairs and,
                with ``task="listwise"``, lists; such as :class:`~unime_st.UniMEReranker`.
            pairwise_weight: Weight of the pair term. 0 leaves it out. Defaults to 1.
            listwise_weight: Weight of the list term. 0 leaves it out. Defaults to 1.
            min_list_length: Train on lists of random length, uniform from this to 1 + x, with that many negatives
                chosen at random, so that the model can rank lists of any length up to 1 + x. None (default): always
                1 + x.
            target_temperature: Train the list term on the judge's scores s instead of the one right answer: cross
                entropy with ``softmax(s / target_temperature)`` over the list. Needs labels. None (default): the
                positive is the answer.
            mini_batch_size: Number of prompts in memory at a time, with gradient caching: the gradient is that of the
                whole batch, and images are decoded for their mini-batch only, twice. None (default) runs all pairs,
                and then all lists, in one forward pass each.
            show_progress_bar: Show a progress bar over the mini-batches. Defaults to False.

        Attributes:
            tokens: Prompt tokens that this process has computed so far, without padding and without second passes.

        References:
            - UniME-V2: https://arxiv.org/abs/2510.13515, section "UniME-V2-Reranker", equations of L_pair and L_list

        Requirements:
            1. Rows of a query, its positive and one or more negatives, the same number in every row.
            2. For the list term a tokenizer that writes the numbers 1 to 1 + x in at most two tokens.

        In training the lists are drawn from torch's generator: ``torch.manual_seed`` and the trainer's seed determine
        them, and a training resumed by the trainer draws the same ones. Several processes draw for the global batch,
        so that training on several devices equals training on one. Evaluation (without gradients) uses the same lists
        every time and leaves the generator alone.

        Inputs:
            +------------------------------------------------+------------------------------------------------------+
            | Inputs                                         | Labels                                               |
            +================================================+======================================================+
            | (query, positive, negative_1, ..., negative_x) | none: negative_1 is the hardest                      |
            +------------------------------------------------+------------------------------------------------------+
            | (query, positive, negative_1, ..., negative_x) | [score(positive), score(negative_1), ...], 1 + x each|
            +------------------------------------------------+------------------------------------------------------+

            Inputs are texts, images, dicts with "text" and / or "image" (a part that is None is absent) or objects
            with a ``to_input()`` that returns such a dict, for example :class:`~unime_st.Item`. Scores may be
            probabilities or log-odds: without ``target_temperature`` only the order of the negatives matters.

        Relations:
            - :class:`~sentence_transformers.cross_encoder.losses.BinaryCrossEntropyLoss` on the same pairs compares
              Yes with No only, and does not keep both above the rest of the vocabulary.

        Example:
            ::

                from datasets import Dataset
                from sentence_transformers.cross_encoder import CrossEncoderTrainer
                from unime_st import UniMEReranker
                from unime_st.losses import RerankerLoss

                model = UniMEReranker("unime-tiny", template="tiny")
                train_dataset = Dataset.from_dict({
                    "query": ["a red square", "a blue circle"],
                    "positive": ["the square is red", "the circle is blue"],
                    "negative_1": ["a red shape", "a green circle"],
                    "negative_2": ["a blue square", "a blue square"],
                    "label": [[0.98, 0.71, 0.02], [0.97, 0.05, 0.12]],
                })
                loss = RerankerLoss(model)
                trainer = CrossEncoderTrainer(model=model, train_dataset=train_dataset, loss=loss)
                trainer.train()
        """
        super().__init__()
        head = model[-1]
        if not isinstance(head, LogitScore) or head.false_token_id is None:
            raise ValueError(
                f"{type(self).__name__} trains a generative CrossEncoder, [Transformer, LogitScore(yes, no)], but the "
                f"model is [{', '.join(type(module).__name__ for module in model)}]. Load it with UniMEReranker(folder)."
            )
        if not min(pairwise_weight, listwise_weight) >= 0 or not 0 < pairwise_weight + listwise_weight < float("inf"):
            raise ValueError(
                "pairwise_weight and listwise_weight must be at least 0 and not both 0, but are "
                f"{pairwise_weight} and {listwise_weight}."
            )
        if mini_batch_size is not None:
            check_count("mini_batch_size", mini_batch_size)
        if min_list_length is not None:
            check_count("min_list_length", min_list_length, at_least=2)
        if target_temperature is not None and not 0 < target_temperature < float("inf"):
            raise ValueError(f"target_temperature must be above 0 or None, but is {target_temperature}.")
        self.model = model
        self.pairwise_weight = pairwise_weight
        self.listwise_weight = listwise_weight
        self.mini_batch_size = mini_batch_size
        self.min_list_length = min_list_length
        self.target_temperature = target_temperature
        self.show_progress_bar = show_progress_bar
        self.uses_gradient_cache = mini_batch_size is not None
        self.yes_id, self.no_id = head.true_token_id, head.false_token_id
        # Kept here because the trainer may replace `self.model` by a wrapper for several devices.
        transformer: Any = model[0]
        self._processor, self._tokenizer = transformer.processor, transformer.tokenizer
        self._to_messages = transformer.input_formatter.pair_to_messages
        self._parts: dict[str, Tensor] = {}
        self.tokens = 0
        if listwise_weight:
            check_list_prompt(self._processor, self.chat("query", ["first", "second"], {}))

    def forward(
        self,
        inputs: Sequence[Sequence[object]],
        labels: Tensor | Sequence[Tensor] | None = None,
        prompt: str | None = None,
        task: str | None = None,
    ) -> dict[str, Tensor]:
        """Compute both terms of a batch.

        Args:
            inputs: The columns query, positive, negative_1, ..., negative_x.
            labels: Judge scores per row, ``(rows, 1 + x)``, or None.
            prompt: Instruction handed to the chat template.
            task: Ignored; the loss renders pairs and lists itself.

        Returns:
            dict[str, Tensor]: The weighted terms "pair" and "list", whose sum is the loss.

        Raises:
            ValueError: If columns or labels are not what the loss takes.
        """
        if len(inputs) < 3:
            raise ValueError(
                f"{type(self).__name__} takes the columns query, positive and at least one negative, but got "
                f"{len(inputs)} column(s). Mine negatives first."
            )
        queries, positives, *negatives = inputs
        count = 1 + len(negatives)
        scores = _scores(labels, len(queries), len(negatives))
        hardest = [0] * len(queries) if scores is None else scores[:, 1:].argmax(1).tolist()
        columns: list[Prompts] = []
        weights: Tensor | None = None
        if self.pairwise_weight:
            columns.append({"queries": queries, "candidates": [[positive] for positive in positives]})
            columns.append(
                {"queries": queries, "candidates": [[negatives[index][row]] for row, index in enumerate(hardest)]}
            )
        if self.listwise_weight:
            indices = self._draw_lists(len(queries), count, queries)
            candidates = list(zip(*inputs[1:], strict=True))
            lists = [[candidates[row][index] for index in order] for row, order in enumerate(indices)]
            weights = list_targets(indices, count, scores, self.target_temperature)
            options = {"options": {"task": "listwise"}}
            columns.append({"queries": queries, "candidates": lists, **options})
            rows, tokens = second_positions(weights, index_answers(self._tokenizer, count))
            if rows:
                longer = {"queries": [queries[row] for row in rows], "candidates": [lists[row] for row in rows]}
                columns.append({**longer, "continue_with": tokens, **options})
        for column in columns:
            # The gradient cache reads the number of rows off a tensor.
            column.update(prompt=prompt, rows=torch.arange(len(column["queries"])))
        if self.uses_gradient_cache:
            total = self.forward_cached(columns, weights)
            # The gradient is attached to the total, so the other term joins it as a number.
            first, *others = self._parts
            return {first: total - sum(self._parts[name] for name in others), **{n: self._parts[n] for n in others}}
        self.calculate_loss(self._in_few_passes(columns), weights)
        return self._parts

    def _in_few_passes(self, columns: list[Prompts]) -> list[list[Tensor]]:
        """Run all prompts; the pairs of the positives and of the hardest negatives share a pass, and so their images."""
        reps: list[list[Tensor]] = []
        if self.pairwise_weight:
            positive, negative, *columns = columns
            both = {name: [*positive[name], *negative[name]] for name in ("queries", "candidates")}
            pairs = self._logits({**positive, **both}, 0, len(both["queries"]))
            reps = [[half] for half in pairs.chunk(2)]
        return reps + [[self._logits(column, 0, len(column["queries"]))] for column in columns]

    def chat(self, query: object, candidates: Sequence[object], opened: dict[object, object]) -> list[Prompts]:
        """Build the messages of one conversation: the query, then its candidates in order.

        ``opened`` is a cache of decoded items, extended in place. Several candidates go with ``task="listwise"``.
        """
        asked = _plain(query, opened)
        pairs = [self._to_messages((asked, _plain(candidate, opened))) for candidate in candidates]
        return [pairs[0][0], *(pair[1] for pair in pairs)]

    def _draw_lists(self, rows: int, count: int, queries: Sequence[object] = ()) -> list[list[int]]:
        """Draw the list of each row: indices of its candidates, 0 being the positive, in the order of the prompt."""
        shortest = count if self.min_list_length is None else min(self.min_list_length, count)
        if torch.is_grad_enabled():
            seed = training_seed(next(self.model.parameters()).device)
        else:
            seed = evaluation_seed(queries)
        return draw_lists(rows, count, shortest, seed)

    def _logits(self, column: Prompts, begin: int, end: int, random_state: RandContext | None = None) -> Tensor:
        """Run the model on prompts of a column and return the logits at the answer, ``(end - begin, vocab)``."""
        # Images are decoded here, so that only those of one mini-batch are in memory.
        opened: dict[object, object] = {}
        rows = zip(column["queries"][begin:end], column["candidates"][begin:end])
        chats = [self.chat(*row, opened) for row in rows]
        features = self.model.preprocess(chats, prompt=column["prompt"], **column.get("options", {}))
        if "continue_with" in column:
            append_tokens(features, column["continue_with"][begin:end])
        if random_state is None:
            self.tokens += int(features["attention_mask"].sum())
        features = batch_to_device(features, next(self.model.parameters()).device)
        if random_state is None:
            return self.model(features)["causal_logits"][:, -1]
        with random_state:
            return self.model(features)["causal_logits"][:, -1]

    def embed_minibatch_iter(
        self,
        sentence_feature: Prompts,
        with_grad: bool,
        copy_random_state: bool,
        random_states: list[RandContext] | None = None,
        ranges: list[tuple[int, int]] | None = None,
    ) -> Iterator[tuple[Tensor, RandContext | None]]:
        """Yield the logits at the answer of each mini-batch, and the saved random state, for the gradient cache."""
        anchor = next(self.model.parameters()).new_empty(0)  # tells the snapshot on which device the model runs
        for index, (begin, end) in enumerate(ranges or []):
            snapshot = RandContext(anchor) if copy_random_state else None
            replay = None if random_states is None else random_states[index]
            with torch.set_grad_enabled(with_grad):
                yield self._logits(sentence_feature, begin, end, replay), snapshot

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Compute the loss of a batch from the logits at the answer position.

        Args:
            reps: Logits of the pairs with the positives, of the pairs with the hardest negatives, of the lists and,
                where numbers take two tokens, of the lists continued by the first of them; each as mini-batches
                ``(mini_batch, vocab)``. A term of weight 0 has none.
            labels: Probability of each position of each list to be the answer, ``(rows, 1 + x)``; or, where every
                answer is one token, the id of the right one, ``(rows,)``.
            with_backward: Back-propagate into ``reps`` and return a detached loss. Defaults to False.

        Returns:
            Tensor: Scalar, the mean over the rows of the weighted sum of both terms.

        Raises:
            ValueError: If the list term has no labels.
        """
        # The cross entropy of half-precision logits would be computed in half precision.
        columns = [_widened(torch.cat(column)) for column in reps]
        parts: dict[str, Tensor] = {}
        if self.pairwise_weight:
            positive, negative, *columns = columns
            right = torch.full((len(positive),), self.yes_id, device=positive.device)
            wrong = torch.full((len(negative),), self.no_id, device=negative.device)
            pair = F.cross_entropy(positive, right) + F.cross_entropy(negative, wrong)
            parts["pair"] = self.pairwise_weight * pair
        if self.listwise_weight:
            if labels is None:
                raise ValueError("calculate_loss got no labels; it needs the answers of the lists.")
            labels = labels.to(columns[0].device)
            if labels.ndim == 1:
                loss = F.cross_entropy(columns[0], labels)
            else:
                loss = answer_cross_entropy(columns, labels, index_answers(self._tokenizer, labels.shape[1]))
            parts["list"] = self.listwise_weight * loss
        total = torch.stack(list(parts.values())).sum()
        if with_backward:
            total.backward()
            total, parts = total.detach(), {name: part.detach() for name, part in parts.items()}
        self._parts = parts
        return total

    def get_config_dict(self) -> dict[str, object]:
        """Options for the model card."""
        return {
            "pairwise_weight": self.pairwise_weight,
            "listwise_weight": self.listwise_weight,
            "mini_batch_size": self.mini_batch_size,
            "min_list_length": self.min_list_length,
            "target_temperature": self.target_temperature,
        }


def _plain(value: object, opened: dict[object, object]) -> object:
    """Decode an item to a dict of its parts, every item once, and drop the parts of a dict that are None."""
    if hasattr(value, "to_input"):
        if value not in opened:
            opened[value] = value.to_input()
        value = opened[value]
    return {key: part for key, part in value.items() if part is not None} if isinstance(value, dict) else value


def _scores(labels: Tensor | Sequence[Tensor] | None, rows: int, negatives: int) -> Tensor | None:
    """Judge scores as one checked tensor."""
    if labels is None:
        return None
    scores = labels if isinstance(labels, Tensor) else torch.stack(list(labels))
    if scores.shape != (rows, 1 + negatives) or not torch.isfinite(scores).all():
        raise ValueError(
            f"RerankerLoss takes one finite score per candidate, the positive's first: shape {(rows, 1 + negatives)}, "
            f"but the labels have shape {tuple(scores.shape)}"
            + ("." if scores.shape != (rows, 1 + negatives) else " and some are not finite.")
        )
    return scores.cpu()


def _widened(logits: Tensor) -> Tensor:
    """Logits in at least float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
