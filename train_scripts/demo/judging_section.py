"""Judge against truth, and judged pairs of a demo run, as sections of its report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from train_scripts.demo.filters import filtered, true_of_query
from train_scripts.demo.seed import Seed
from train_scripts.demo.settings import PAIR_ORDERS
from unime_st.data.logits import to_scores
from unime_st.data.parquet_shards import Row
from unime_st.data.scenes import TwinTruth
from unime_st.judging.score_store import Scores
from unime_st.report.html import Html, element, join, show_item, show_items, table

_PER_DIRECTION = 2  # cards
_SHOWN = 8  # candidates per card


def quality_table(rows: Sequence[dict[str, Any]]) -> Html:
    """Table of the judge's quality against the truth, mean over seeds."""

    def mean(task: str, name: str) -> str:
        values = [row[name] for row in rows if row["task"] == task and row[name] is not None]
        return f"{np.mean(values):.2f}" if values else "–"

    columns = {
        "AUC": "auc",
        "precision of the filter": "precision",
        "recall of the filter": "recall",
        "candidates dropped": "dropped",
        "false negatives in the top 8": "false_negatives",
    }
    lines = [[task.replace("_", " "), *(mean(task, name) for name in columns.values())] for task in PAIR_ORDERS]
    caption = (
        "The judge on mined candidates against the truth: AUC of its log-odds, and what its filter drops as false "
        "negatives (precision: share of it that is false; recall: share of the false negatives that it finds)"
    )
    return table(["pairs", *columns], [("", lines)], caption=caption)


def judged_gallery(run: Seed) -> Html:
    """Cards of judged pools: query, positive, and the nearest candidates with score, verdict and truth."""
    truth = TwinTruth(run.arguments.records, seed=run.seed)
    cards = [_card(run, scores, row, truth) for scores, row in _examples(run)]
    how = (
        "The first pairs with both dropped and kept candidates, the most similar candidates first; nothing was picked "
        "by hand. A frame says what the filter did, the line below what is true."
    )
    return join([element("p", how, class_="muted"), *cards])


def _examples(run: Seed) -> Iterator[tuple[Scores, Row]]:
    for task in PAIR_ORDERS:
        scores = Scores(run.path(f"scores-{task}"))
        mixed = (row for row in scores.row_shards.rows() if _is_mixed(row, run.arguments.margin))
        yield from ((scores, row) for row in islice(mixed, _PER_DIRECTION))


def _is_mixed(row: Row, margin: float) -> bool:
    dropped = filtered(row, margin)[:_SHOWN]
    return bool(dropped.any() and not dropped.all())


def _card(run: Seed, scores: Scores, row: Row, truth: TwinTruth) -> Html:
    dropped, true = filtered(row, run.arguments.margin), true_of_query(row, truth)
    judged, candidates = to_scores(row["logits"]), []
    for index, item_id in enumerate(row["candidates"][:_SHOWN]):
        style = "bad" if dropped[index] else "good"
        below = [
            _numbers(float(judged[index]), row["similarities"][index]),
            element("b", "✗ dropped" if dropped[index] else "✓ kept", class_=style),
            element("div", "a false negative" if true[index] else "a true negative", class_="facts"),
        ]
        candidates.append((scores.item(item_id), below, style))
    own = _numbers(float(to_scores(row["positive_logit"])), row["positive_similarity"])
    left = [
        element("h4", f"Query ({row['dataset'].replace('_', ' ')})"),
        show_item(scores.item(row["query"]), style="plain"),
        element("h4", "Its positive", style="margin-top:.7rem"),
        show_item(scores.item(row["positive"]), own, style="plain"),
    ]
    right = element("div", element("h4", "Candidates"), show_items(candidates))
    return element("div", element("div", element("div", *left), right, class_="sides"), class_="card")


def _numbers(score: float, similarity: float) -> Html:
    lines = (f"P(Yes) {score:.2f}", f"cosine {similarity:.2f}")
    return element("div", *(element("div", line) for line in lines), class_="facts")
