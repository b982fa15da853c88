"""Training stage of a reranker: pairwise and listwise prompts made of judged rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from unime_st.data.records import RecordSet
from unime_st.encoding import TokenCounter
from unime_st.encoding.model_inputs import Features
from unime_st.losses import RerankerLoss
from unime_st.reranking.unime_reranker import UniMEReranker
from unime_st.training.adapters import computation_dtype
from unime_st.training.arguments import StageArguments
from unime_st.training.distinct_items import RerankerItemCollator
from unime_st.training.evaluation import RankingEvaluator
from unime_st.training.item_tokens import counted_costs, usable_rows
from unime_st.training.planning import (
    MeasuredPass,
    count_steps,
    estimate_training,
    flops_per_token,
    measure_pass,
    peak_matmul_flops,
)
from unime_st.training.run import TrainingStage, shards_weights
from unime_st.training.trainer import RerankerTrainer


class _InPairs:
    """A reranker whose :meth:`preprocess` takes items one by one, each beside the text "0", to count their tokens."""

    def __init__(self, model: UniMEReranker) -> None:
        self._model = model
        self.tokenizer = model.tokenizer

    def __getitem__(self, index: int) -> object:
        return self._model[index]

    def preprocess(self, inputs: Sequence[object], prompt: str | None = None) -> Features:
        return self._model.preprocess([(value, "0") for value in inputs], prompt=prompt)


class RerankerStage(TrainingStage[StageArguments, UniMEReranker]):
    """Training stage of a reranker, see :class:`~unime_st.training.run.TrainingStage`."""

    trainer_class = RerankerTrainer
    loading = 'CrossEncoder("{}")'

    def __init__(self, name: str, args: StageArguments) -> None:
        if shards_weights(args):
            raise ValueError(
                "A reranker's weights cannot be sharded (FSDP): its processes need different numbers of forward "
                "passes, and would wait for each other. Start it with torchrun (DDP)."
            )
        super().__init__(name, args)

    def _load(self, **options: Any) -> UniMEReranker:
        return UniMEReranker(self.args.model, **options)

    def _evaluator(self, records: RecordSet) -> RankingEvaluator:
        return RankingEvaluator(records, batch_size=self.args.per_device_eval_batch_size)

    def train(self, model: UniMEReranker, rows: Dataset, loss: RerankerLoss) -> None:
        """Train a model; a dry run ends with the plan.

        ``rows`` have the columns ``query, positive, negative_1, ...`` of item ids, with optional ``label``.
        """
        args, dtype = self.args, computation_dtype(self.args)
        items = _InPairs(model)
        tokens, _ = counted_costs(args, self.records, items)
        rows, indices, set_aside = usable_rows(args, self.records, rows, tokens)
        self.check_rows(len(rows))
        empty, zero = TokenCounter(items)([{"text": ""}, {"text": "0"}]).tolist()  # type: ignore[arg-type]  # a part suffices
        hardest = np.array(rows["label"])[:, 1:].argmax(axis=1) if "label" in rows.column_names else 0
        row_tokens = _prompt_tokens(
            model, loss, tokens[indices] - empty, hardest, pair=2 * empty - zero, zero=zero - empty
        )
        cached = loss.uses_gradient_cache
        collator = RerankerItemCollator(model.preprocess, records=self.records)
        flops = flops_per_token(model, cached=cached, recomputed=bool(args.gradient_checkpointing))
        plan = estimate_training(
            args,
            model,
            row_tokens,
            self._measure(model, loss, collator, rows, indices, row_tokens, dtype),
            steps=count_steps(args, len(rows)),
            flops_per_token=flops,
            set_aside=set_aside,
            largest_item=int(tokens[indices].max()) - empty,
            mini_batch=f"{args.mini_batch_size} prompts at a time, gradients cached"
            if cached
            else "the whole batch in one pass",
        )
        self.fit(
            model,
            rows,
            loss,
            collator,
            plan,
            cached=cached,
            flops_per_token=flops,
            peak_matmul_flops=peak_matmul_flops(model.device, dtype),
        )

    def _measure(
        self,
        model: UniMEReranker,
        loss: RerankerLoss,
        collator: RerankerItemCollator,
        rows: Dataset,
        indices: np.ndarray,
        row_tokens: np.ndarray,
        dtype: torch.dtype,
    ) -> list[MeasuredPass]:
        """The most expensive rows with the longest lists, so that they fail now if they do; then usual ones."""
        batch = self.args.per_device_train_batch_size
        size = min(batch, self.args.mini_batch_size or batch)
        order = np.argsort(-row_tokens, kind="stable")
        middle = max(0, min(len(order) // 2, len(order) - size))

        def passing(chosen: np.ndarray) -> Callable[[], tuple[torch.Tensor, int]]:
            columns = [[self.records.items.at(int(index)) for index in column] for column in indices[chosen].T]
            labels = torch.tensor(rows[chosen.tolist()]["label"]) if "label" in rows.column_names else None

            def run() -> tuple[torch.Tensor, int]:
                with collator.naming_items(chain.from_iterable(columns)):
                    terms = loss(columns, labels)
                return torch.stack(list(terms.values())).sum(), int(row_tokens[chosen].sum())

            return run

        shortest, loss.min_list_length = loss.min_list_length, None
        try:
            largest = measure_pass(model, passing(order[:size]), dtype)
        finally:
            loss.min_list_length = shortest
        return [largest, measure_pass(model, passing(order[middle : middle + size]), dtype)]


def _prompt_tokens(
    model: UniMEReranker,
    loss: RerankerLoss,
    lengths: np.ndarray,
    hardest: np.ndarray | int,
    *,
    pair: int,
    zero: int,
) -> np.ndarray:
    """Tokens of the prompts that a row is expected to become; of its negatives, lists have some, drawn at random.

    ``lengths`` (rows, 2 + negatives) are the tokens of query, positive and negatives alone, ``hardest`` is the
    negative of each row that is paired, ``pair`` a pair's prompt without its items, ``zero`` the text "0".
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
