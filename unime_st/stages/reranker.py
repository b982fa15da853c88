"""UniME-V2-Reranker: pairwise Yes/No and listwise index answers, trained on judged rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments

from unime_st.data.records import RecordSet
from unime_st.losses import RerankerLoss
from unime_st.options import option
from unime_st.scoring.prompts import template_for
from unime_st.training.arguments import StageArguments
from unime_st.training.rerankers import RerankerStage
from unime_st.training.rows import rows_with_negatives


@dataclass
class RerankerArguments(StageArguments, CrossEncoderTrainingArguments):
    """Options of :func:`train_reranker`."""

    data: str = option(
        "",
        "Folder of judged rows.",
        required=True,
        path="stage",
        made_by="unime judge --data POOLS --scores FOLDER --output FOLDER",
    )
    template: str = option(
        "auto", "Prompt template: official, tiny or a file; auto: tiny for unime-tiny, official for others."
    )
    num_negatives: int = option(
        9, "Negatives of a list, those that the judge scores highest.", unit="negatives", at_least=1
    )
    pairwise_weight: float = option(1.0, "Weight of the Yes/No term.", at_least=0)
    listwise_weight: float = option(1.0, "Weight of the list term.", at_least=0)
    # Ranking is in lists of up to ten, and the last one may be short.
    min_list_length: int | None = option(
        2, "Shortest list; lengths are drawn up to 1 + num_negatives. None: all have that length.",
        unit="candidates", at_least=2,
    )  # fmt: skip
    target_temperature: float | None = option(
        None, "Temperature T of the list's target softmax(score / T); none: the positive alone.", above=0
    )


def train_reranker(args: RerankerArguments) -> Path:
    """Train a reranker with pairwise and listwise answers (UniME-V2, https://arxiv.org/abs/2510.13515).

    Args:
        args: Options; ``data`` is a folder of judged rows.

    Returns:
        Folder of the trained reranker.
    """
    with RerankerStage("reranker", args) as stage:
        if stage.done:
            return stage.output
        stored = stored_negatives(stage.records, args.num_negatives)
        rows = hardest_negatives(rows_with_negatives(stage.records, stored), args.num_negatives)
        model = stage.load_model(template=template_for(args.template, args.model))
        loss = RerankerLoss(
            model,
            args.pairwise_weight,
            args.listwise_weight,
            min_list_length=args.min_list_length,
            target_temperature=args.target_temperature,
            mini_batch_size=args.mini_batch_size,
        )
        stage.train(model, rows, loss)
    return stage.output


def stored_negatives(records: RecordSet, at_least: int) -> int:
    """How many negatives every row has, or ``at_least`` where some have fewer."""
    counts = [len(negatives or ()) for negatives in records.row_shards.column("negatives").to_pylist()]
    return max(min(counts, default=0), at_least)


def hardest_negatives(rows: Dataset, num_negatives: int) -> Dataset:
    """Keep the negatives with the highest scores of each row, in the order in which they are stored.

    ``rows`` have the columns ``query, positive, negative_1, ...`` of item ids and, where judged, ``label``: the scores,
    the positive's first. Without scores the first negatives are kept. UniME-V2 (https://arxiv.org/abs/2510.13515),
    "UniME-V2-Reranker": the top-x hard negatives by score.

    Example:
        >>> from datasets import Dataset
        >>> from unime_st.stages.reranker import hardest_negatives
        >>> rows = Dataset.from_dict({"query": ["q"], "positive": ["p"], "negative_1": ["a"], "negative_2": ["b"],
        ...                           "negative_3": ["c"], "label": [[0.875, 0.5, 0.125, 0.75]]})
        >>> kept = hardest_negatives(rows, 2)[0]
        >>> kept["negative_1"], kept["negative_2"], kept["label"]
        ('a', 'c', [0.875, 0.5, 0.75])
    """
    names = [name for name in rows.column_names if name.startswith("negative_")]
    if len(names) <= num_negatives or "label" not in rows.column_names:
        return rows.remove_columns(names[num_negatives:])
    scores = np.array(rows["label"])
    chosen = np.sort(np.argsort(-scores[:, 1:], axis=1, kind="stable")[:, :num_negatives], axis=1)
    ids = np.stack([np.array(rows[name], dtype=object) for name in names], axis=1)
    kept = np.take_along_axis(ids, chosen, axis=1)
    table = {name: list(rows[name]) for name in rows.column_names if name not in (*names, "label")}
    table |= {f"negative_{index + 1}": kept[:, index].tolist() for index in range(num_negatives)}
    labels = np.concatenate([scores[:, :1], np.take_along_axis(scores[:, 1:], chosen, axis=1)], axis=1)
    return Dataset(pa.table({**table, "label": labels.astype(np.float32).tolist()}))
