"""Filters of mined candidates beside the judge's, the truth among them, and the judge's quality against the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from train_scripts.demo.seed import Seed
from train_scripts.demo.settings import PAIR_ORDERS
from unime_st.data.logits import to_scores
from unime_st.data.manifest import is_complete
from unime_st.data.parquet_shards import Row
from unime_st.data.records import PairRecord, RecordSet
from unime_st.data.scenes import TwinTruth
from unime_st.judging.calibration import auc
from unime_st.judging.score_store import Scores
from unime_st.judging.select import surviving
from unime_st.selection import select_negatives

_TOP = 8  # candidates among which false negatives are counted


def _unfiltered(row: Row, truth: TwinTruth) -> list[bool]:
    return [False] * len(row["candidates"])


def _more_similar(row: Row, truth: TwinTruth) -> list[bool]:
    return [similarity >= row["positive_similarity"] for similarity in row["similarities"]]


def true_of_query(row: Row, truth: TwinTruth) -> list[bool]:
    """Which candidates of a row are false negatives: documents that are true of the query."""
    return [truth(row["query"], candidate) for candidate in row["candidates"]]


FILTERS: dict[str, Callable[[Row, TwinTruth], list[bool]]] = {
    "mined": _unfiltered,
    "similarity": _more_similar,
    "truth": true_of_query,
}
"""Which candidates of a row count as false negatives, by the name of the model that is trained without them."""


def write_rows(run: Seed, name: str, truth: TwinTruth) -> None:
    """Write the training rows of a filter, chosen by the rule of :func:`~unime_st.selection.select_negatives`.

    Args:
        run: The seed.
        name: Key of :data:`FILTERS`.
        truth: Which pairs of the seed's items are true.
    """
    folder = run.path(f"rows-{name}")
    if is_complete(folder):
        return
    records = []
    for task in PAIR_ORDERS:
        scores = Scores(run.path(f"scores-{task}"))
        for number, row in enumerate(scores.row_shards.rows()):
            chosen, _ = select_negatives(
                np.asarray(FILTERS[name](row, truth), float),
                1.0,
                stride=1,
                num_negatives=run.arguments.num_negatives,
                generator=np.random.default_rng([run.seed, number]),
            )
            ids = (row["query"], row["positive"], *(row["candidates"][index] for index in chosen))
            query, positive, *negatives = map(scores.item, ids)
            records.append(PairRecord(query, positive, task, tuple(negatives)))
    RecordSet.write(folder, records, {"filter": name})


def filtered(row: Row, margin: float) -> np.ndarray:
    """Mask of the candidates of a judged row that the judge's filter drops, by the rule of ``unime judge``."""
    positive = float(to_scores(row["positive_logit"]))
    return ~surviving(to_scores(row["logits"]), positive, margin, relax_low_positive=True)


def judge_quality(run: Seed, truth: TwinTruth) -> list[dict[str, Any]]:
    """Compare the judge with the truth, over all mined candidates of each direction.

    Args:
        run: The seed.
        truth: Which pairs of the seed's items are true.

    Returns:
        Per direction the AUC of the log-odds (true of the query or not), precision and recall of what the filter drops,
        and the share of false negatives among the most similar candidates.
    """
    found = []
    for task in PAIR_ORDERS:
        rows = list(Scores(run.path(f"scores-{task}")).row_shards.rows())
        true = [np.array(true_of_query(row, truth)) for row in rows]
        dropped = np.concatenate([filtered(row, run.arguments.margin) for row in rows])
        every, logits = np.concatenate(true), np.concatenate([row["logits"] for row in rows])
        hits = (dropped & every).sum()
        found.append(
            {
                "seed": run.seed,
                "task": task,
                "auc": auc(logits[every], logits[~every]),
                "precision": float(hits / max(dropped.sum(), 1)),
                "recall": float(hits / max(every.sum(), 1)),
                "dropped": float(dropped.mean()),
                "false_negatives": float(np.mean([part[:_TOP].mean() for part in true])),
            }
        )
    return found
