"""Evaluators for held-out records while training: hit@1 and MRR@10 of an embedding model and of a reranker."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from typing import Any

import numpy as np
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.model import BaseModel

from unime_st.data.records import RecordSet
from unime_st.encoding import encode_items
from unime_st.retrieval import top_k
from unime_st.training.item_prompts import ItemPrompts

logger = logging.getLogger(__name__)
_CUTOFF = 10


class HeldOutEvaluator(BaseEvaluator, ABC):
    """Evaluator over held-out pair records, for the stock trainers' ``evaluator``."""

    def __init__(self, records: RecordSet, *, batch_size: int = 64, name: str = "") -> None:
        super().__init__()
        self.records, self.batch_size, self.name = records, batch_size, name
        self.primary_metric = f"mrr@{_CUTOFF}"

    @abstractmethod
    def ranks(self, model: Any) -> np.ndarray:
        """Rank of the positive of every query, from 1; 0 where it is beyond the cutoff. int64 of shape (queries,)."""

    def __call__(
        self, model: BaseModel, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate a model: ``hit@1`` and ``mrr@10``, means over the queries."""
        ranks = self.ranks(model)
        found = ranks > 0
        reciprocal = np.divide(1.0, ranks, where=found, out=np.zeros(len(ranks)))
        metrics = {"hit@1": float((ranks == 1).mean()), f"mrr@{_CUTOFF}": float(reciprocal.mean())}
        logger.info("evaluation at step %d: hit@1 %.4f, MRR@10 %.4f.", steps, *metrics.values())
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def get_config_dict(self) -> dict[str, int]:
        """Configuration for the model card."""
        return {"queries": len(self.records), "cutoff": _CUTOFF}


class RetrievalEvaluator(HeldOutEvaluator):
    """Retrieval of every query's positive among the positives of its dataset.

    Every distinct item is embedded once, queries and documents with the prompts of the model. Other positives of a query
    count as found, too, and the query itself is not a candidate. Rows with an image that cannot be read are left out, with a
    warning.

    Example:
        >>> import tempfile
        >>> from unime_st import Item, UniME
        >>> from unime_st.data.records import PairRecord, RecordSet
        >>> from unime_st.training.evaluation import RetrievalEvaluator
        >>> pairs = [PairRecord(Item(text), Item(text)) for text in ("a red square", "a blue circle")]
        >>> sorted(RetrievalEvaluator(RecordSet.write(tempfile.mkdtemp(), pairs, {}))(UniME("unime-tiny")))
        ['hit@1', 'mrr@10']
    """

    def ranks(self, model: SentenceTransformer) -> np.ndarray:
        """Rank of the first positive of every distinct query, see :class:`HeldOutEvaluator`."""
        table = self.records.row_shards.table(["query", "positive", "dataset"])
        queries, positives = (self.records.items.positions(table[name].to_pylist()) for name in ("query", "positive"))
        prompts, count = ItemPrompts(self.records, model), len(self.records.items)
        pairs = prompts.positions(["query", "positive"], np.stack([queries, positives], axis=1))
        used, indices = np.unique(pairs, return_inverse=True)
        queries, positives = indices.reshape(pairs.shape).T
        sides, stored = np.divmod(used, count)
        parts = [
            encode_items(
                model,
                [self.records.items.at(int(position)) for position in stored[sides == side]],
                prompt=prompts.options[side].get("prompt") or "",
                batch_size=self.batch_size,
                on_error="skip",
            )
            for side in np.unique(sides)
        ]
        vectors, readable = (np.concatenate(arrays) for arrays in zip(*parts))
        rows = np.flatnonzero(readable[queries] & readable[positives])
        if len(rows) < len(queries):
            logger.warning(
                "%s: %d rows with unreadable images left out.", self.records.folder, len(queries) - len(rows)
            )
        members = defaultdict(list)
        for row in rows.tolist():
            members[str(table["dataset"][row])].append(row)
        return np.concatenate([_first_ranks(vectors, queries[m], positives[m], stored) for m in members.values()])


def _first_ranks(vectors: np.ndarray, queries: np.ndarray, positives: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Rank of the first positive of every distinct query of a dataset; ``stored`` are the items of the vectors."""
    corpus = np.unique(positives)
    relevant: dict[int, set[int]] = defaultdict(set)
    for query, position in zip(queries.tolist(), np.searchsorted(corpus, positives).tolist(), strict=True):
        relevant[query].add(position)
    asked = list(relevant)
    # A query that is its own positive, as an image and its copy are, may find itself.
    hidden = [
        [int(p) for p in np.flatnonzero(stored[corpus] == stored[query]) if int(p) not in relevant[query]]
        for query in asked
    ]
    _, found = top_k(vectors[asked], vectors[corpus], min(_CUTOFF, len(corpus)), exclude=hidden)
    hits = [
        [position in relevant[query] for position in row] for query, row in zip(asked, found.tolist(), strict=True)
    ]
    return np.array([row.index(True) + 1 if True in row else 0 for row in hits])


class RankingEvaluator(HeldOutEvaluator):
    """Ranking of every query's positive among the negatives of its row, at most ``num_negatives``: lists of ten.

    Rows without negatives get the positives of other rows of their dataset, drawn once. A negative that scores like
    the positive stands before it.
    """

    def __init__(self, records: RecordSet, *, batch_size: int = 64, name: str = "", num_negatives: int = 9) -> None:
        super().__init__(records, batch_size=batch_size, name=name)
        table = records.row_shards.table(["query", "positive", "dataset", "negatives"]).to_pylist()
        by_dataset: dict[str, list[str]] = defaultdict(list)
        for row in table:
            by_dataset[row["dataset"]].append(row["positive"])
        draw = np.random.default_rng(0)
        self._rows = []
        for row in table:
            negatives = row["negatives"][:num_negatives]
            if not negatives:
                others = [i for i in dict.fromkeys(by_dataset[row["dataset"]]) if i != row["positive"]]
                chosen = draw.permutation(len(others))[:num_negatives]
                negatives = [others[index] for index in chosen]
            self._rows.append((row["query"], [row["positive"], *negatives]))

    def ranks(self, model: CrossEncoder) -> np.ndarray:
        """Rank of the positive of every row, see :class:`HeldOutEvaluator`."""
        item = self.records.item
        pairs = [(item(query), item(candidate)) for query, candidates in self._rows for candidate in candidates]
        scores: np.ndarray = model.predict(pairs, batch_size=self.batch_size, show_progress_bar=False)  # type: ignore[call-overload]
        ranks, start = [], 0
        for _, candidates in self._rows:
            positive, *negatives = scores[start : start + len(candidates)].tolist()
            start += len(candidates)
            ranks.append(1 + sum(score >= positive for score in negatives))
        return np.where(np.array(ranks) <= _CUTOFF, ranks, 0)
