"""Training rows of item ids, from records: pairs, pairs with negatives, judged rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from unime_st.data.logits import to_scores
from unime_st.data.records import RecordSet


def pair_rows(records: RecordSet) -> Dataset:
    """Rows (query, positive) of item ids, with the name of their dataset."""
    return Dataset(records.row_shards.table(["query", "positive", "dataset"]))


def rows_with_negatives(records: RecordSet, num_negatives: int, *, log_odds: bool = False) -> Dataset:
    """Rows (query, positive, negative_1..k) of item ids, the first ``num_negatives`` that are stored.

    Judged rows have a ``label``: the scores P(Yes) as float32, the positive's first; with ``log_odds`` the log-odds, those
    of negatives at most the positive's, as stands for negatives that count as matches.

    Raises:
        ValueError: If a row has too few negatives, or only some rows are judged.
    """
    table = records.row_shards.table(["query", "positive", "negatives", "positive_logit", "negative_logits"])
    stored = pc.list_value_length(table["negatives"]).to_numpy()
    if len(short := np.flatnonzero(stored < num_negatives)):
        raise ValueError(
            f"{records.folder}, row {short[0]}: {stored[short[0]]} negatives are stored, {num_negatives} are needed. "
            "Mine and judge so many (unime judge), or lower num_negatives."
        )
    columns = {name: table[name] for name in ("query", "positive")}
    columns |= {f"negative_{n + 1}": pc.list_element(table["negatives"], n) for n in range(num_negatives)}
    judged = len(table) - table["positive_logit"].null_count
    if 0 < judged < len(table):
        raise ValueError(f"{records.folder}: only {judged} of {len(table)} rows are judged; judge all or none.")
    if judged:
        logits = [
            table["positive_logit"],
            *(pc.list_element(table["negative_logits"], n) for n in range(num_negatives)),
        ]
        stored_logits = np.stack([column.to_numpy() for column in logits], axis=1)
        scores = np.minimum(stored_logits, stored_logits[:, :1]) if log_odds else to_scores(stored_logits)
        scores = scores.astype(np.float32)
        offsets = np.arange(0, scores.size + 1, scores.shape[1], dtype=np.int32)
        columns["label"] = pa.ListArray.from_arrays(offsets, scores.ravel())
    return Dataset(pa.table(columns))


def judged_rows(records: RecordSet, num_negatives: int, *, log_odds: bool = False) -> Dataset:
    """:func:`rows_with_negatives` of judged records, with the name of their dataset."""
    rows = rows_with_negatives(records, num_negatives, log_odds=log_odds)
    if "label" not in rows.column_names:
        raise ValueError(f"{records.folder}: the rows have no judge scores. Judge and select first (unime judge).")
    return rows.add_column("dataset", records.row_shards.column("dataset").to_pylist())
