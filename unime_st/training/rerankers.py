"""From judged rows of item ids to the reranker's loss, its collator and a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from unime_st.data.records import RecordSet
from unime_st.encoding import TokenCounter
from unime_st.losses import RerankerLoss
from unime_st.reranking.unime_reranker import UniMEReranker
from unime_st.training.adapters import computation_dtype
from unime_st.training.arguments import RerankerArguments
from unime_st.training.distinct_items import RerankerItemCollator
from unime_st.training.item_tokens import counted_costs, usable_rows
from unime_st.training.planning import (
    MeasuredPass,
    count_steps,
    estimate_training,
    flops_per_token,
    measure_pass,
    peak_matmul_flops,
)
from unime_st.training.run import Setup


class _InPairs:
    """A reranker whose :meth:`preprocess` takes items one by one, each beside the text "0", to count their tokens."""

    def __init__(self, model: UniMEReranker) -> None:
        self._model = model
        self.tokenizer = model.tokenizer

    def __getitem__(self, index: int) -> Any:
        return self._model[index]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None) -> dict[str, Any]:
        return self._model.preprocess([(value, "0") for value in inputs], prompt=prompt)


@dataclass
class RerankerSetup:
    """Makes the :class:`~unime_st.training.run.Setup` of the reranker.

    Args:
        arguments: Options.
        records: Where the item ids lead.
        loss: Makes the loss for the model.
    """

    arguments: RerankerArguments
    records: RecordSet
    loss: Callable[[Any], RerankerLoss]

    def __call__(self, model: Any, rows: Dataset) -> Setup:
        """Count tokens, set rows aside that cannot be used, and rehearse the most expensive mini-batch."""
        a = self.arguments
        costs, _ = counted_costs(a, self.records, _InPairs(model))
        rows, indices, aside = usable_rows(a, self.records, rows, costs)
        loss = self.loss(model)
        count = TokenCounter(_InPairs(model))  # type: ignore[arg-type]  # as much of a model as it needs
        empty, zero = count([{"text": ""}, {"text": "0"}]).tolist()
        hardest = np.array(rows["label"])[:, 1:].argmax(axis=1) if "label" in rows.column_names else 0
        row_costs = self._prompts(
            model, loss, costs[indices] - empty, hardest, pair=2 * empty - zero, zero=zero - empty
        )
        dtype = computation_dtype(a)
        operations = flops_per_token(model, cached=loss.uses_gradient_cache, recomputed=a.gradient_checkpointing)
        words = "the whole batch in one pass"
        if a.mini_batch_size is not None:
            words = f"{a.mini_batch_size} prompts at a time, gradients cached"
        return Setup(
            rows=rows,
            loss=loss,
            collator=RerankerItemCollator(model.preprocess, records=self.records),
            plan=estimate_training(
                a,
                model,
                row_costs,
                self._rehearse(model, loss, rows, indices, row_costs, dtype),
                steps=count_steps(a, len(rows)),
                operations=operations,
                set_aside=aside,
                largest_item=int(costs[indices].max()) - empty,
                mini_batch=words,
            ),
            flops_per_token=operations,
            peak_matmul_flops=peak_matmul_flops(model.device, dtype),
            cached=loss.uses_gradient_cache,
        )

    def _prompts(
        self,
        model: UniMEReranker,
        loss: RerankerLoss,
        lengths: np.ndarray,
        hardest: np.ndarray | int,
        *,
        pair: int,
        zero: int,
    ) -> np.ndarray:
        """Tokens of the prompts that a row is expected to become; of its negatives, lists have some, drawn at random.

        Args:
            model: The reranker.
            loss: Its loss.
            lengths: Tokens of the items alone, of shape (rows, 2 + negatives): query, positive, negatives.
            hardest: Which negative of each row is paired.
            pair: Tokens of a pair's prompt without its items.
            zero: Tokens of the text "0".
        """
        query, positive, negatives = lengths[:, 0], lengths[:, 1], lengths[:, 2:]
        total = np.zeros(len(lengths))
        if loss.pairwise_weight:
            total += 2 * (pair + query) + positive + negatives[np.arange(len(lengths)), hardest]
        if loss.listwise_weight:
            most = negatives.shape[1] + 1
            listed = (min(loss.min_list_length or most, most) + most) / 2
            chat = loss.chat("0", ["0"] * round(listed), {})
            prompt = int(model.preprocess([chat], task="listwise")["attention_mask"].sum())
            total += prompt - (round(listed) + 1) * zero + query + positive + negatives.mean(axis=1) * (listed - 1)
        return total

    def _rehearse(
        self,
        model: Any,
        loss: RerankerLoss,
        rows: Dataset,
        indices: np.ndarray,
        row_costs: np.ndarray,
        dtype: torch.dtype,
    ) -> list[MeasuredPass]:
        """The most expensive rows with the longest lists, so that they fail now if they do; then usual ones."""
        a = self.arguments
        size = min(a.batch_size, a.mini_batch_size or a.batch_size)
        order = np.argsort(-row_costs, kind="stable")
        middle = max(0, min(len(order) // 2, len(order) - size))

        def passing(chosen: np.ndarray) -> Callable[[], tuple[torch.Tensor, int]]:
            columns = [[self.records.items.at(int(index)) for index in column] for column in indices[chosen].T]
            labels = torch.tensor(rows[chosen.tolist()]["label"]) if "label" in rows.column_names else None
            return lambda: (torch.stack(list(loss(columns, labels).values())).sum(), int(row_costs[chosen].sum()))

        shortest, loss.min_list_length = loss.min_list_length, None
        try:
            largest = measure_pass(model, passing(order[:size]), dtype)
        finally:
            loss.min_list_length = shortest
        return [largest, measure_pass(model, passing(order[middle : middle + size]), dtype)]
