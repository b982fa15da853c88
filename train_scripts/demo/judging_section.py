"""Judge scores and selected hard negatives of a demo run, as sections of its report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from train_scripts.demo.charts import histogram
from unime_st.data.logits import to_scores
from unime_st.data.manifest import is_complete, read_manifest
from unime_st.data.records import RecordSet
from unime_st.judging.score_store import JudgedPool, Scores
from unime_st.report.html import Content, Html, element, facts, join, show_item, show_items

_SHOWN_FILTERED, _SHOWN = 3, 8  # candidates per card
_LOOK_AT = 4000  # rows searched for examples
_HISTOGRAMS = {
    "positive": "own positives",
    "candidates": "mined candidates",
    "negatives": "chosen negatives",
}


def selection_statistics(folder: Path) -> Html:
    """Counts and histograms of the false-negative filter.

    Args:
        folder: Folder of one seed.

    Returns:
        Html: Counts and histograms from the manifest of the training rows, or a line that says they are missing.
    """
    if not is_complete(folder / "rows"):
        return element("p", "This run has no finished selection, so there is nothing to show here.")
    manifest = read_manifest(folder / "rows")
    found, options = manifest["statistics"], manifest["options"]
    wanted = options["num_negatives"]
    counts: dict[str, Content] = {
        "judged pairs with candidates": found["rows"],
        "candidates": found["candidates"],
        "filtered as false negatives": _share(found["false_negatives_filtered"], found["candidates"], "candidates"),
        "pairs that lost at least one": _share(found["rows_with_filtered"], found["rows"], "pairs"),
        f"pairs with fewer than {wanted} left (repeated)": _share(found["short"], found["rows"], "pairs"),
        "pairs with none left (random candidates, trained as matches)": _share(
            found["none_left"], found["rows"], "pairs"
        ),
        "pairs set aside, no candidate at all": manifest["rejected"],
    }
    charts = [
        _figure(f"P(Yes) of {name}", histogram(counted, low=0.0, high=1.0, x_label="P(Yes)"))
        for key, name in _HISTOGRAMS.items()
        if sum(counted := found["score_histograms"][key])
    ]
    ranks = found["rank_histogram"]
    if sum(ranks):
        name = "Rank of chosen negatives (0 = most similar)"
        charts.append(_figure(name, histogram(ranks, low=0, high=len(ranks), x_label="rank")))
    rule = (
        f"A candidate is filtered when its score is above that of the pair's own positive less {options['margin']:g}; "
        f"of the rest, every {options['stride']}th by similarity is taken, {wanted} in all."
    )
    return join([element("p", rule), facts(counts), element("div", *charts, class_="charts four")])


def _share(part: int, whole: int, of: str) -> str:
    return f"{part} of {whole} {of} ({100 * part / max(whole, 1):.1f} %)"


def _figure(title: str, chart: Html) -> Html:
    return element("figure", element("figcaption", title), chart)


def judged_gallery(folder: Path) -> Html:
    """Cards of judged pools: query, positive, and candidates with their scores and whether each was filtered or chosen.

    Args:
        folder: Folder of one seed.

    Returns:
        Html: Cards, or a line that says that nothing was judged.
    """
    if not (is_complete(folder / "scores") and is_complete(folder / "rows")):
        return element("p", "This run has no judged pairs, so there is nothing to show here.")
    scores, rows = Scores(folder / "scores"), RecordSet.load(folder / "rows")
    options = rows.manifest["options"]
    cards = [_card(pool, chosen, options) for pool, chosen in _examples(scores, rows, options)]
    if not cards:
        return element("p", "No judged pair has both a filtered and a chosen candidate.")
    how = (
        f"The first pair of each kind with at least one filtered and one chosen candidate; nothing was "
        f"picked by hand. At most {_SHOWN} candidates of each are shown, most similar to the query first."
    )
    return join([element("p", how, class_="muted"), *cards])


def _examples(
    scores: Scores, rows: RecordSet, options: dict[str, Any]
) -> Iterator[tuple[JudgedPool, dict[str, bool]]]:
    """Pools with both a filtered and a chosen candidate, each with the ids of its chosen negatives."""
    shown: set[str] = set()
    chosen: dict[tuple[str, str], list[str]] = {}
    for row in rows.row_shards.rows():
        chosen[row["query"], row["positive"]] = row["negatives"]
        if len(chosen) >= _LOOK_AT:
            break
    for number, row in enumerate(scores.row_shards.rows()):
        negatives = dict.fromkeys(chosen.get((row["query"], row["positive"]), ()), True)
        if row["dataset"] in shown or not negatives:
            continue
        filtered = _filtered(row["positive_logit"], row["logits"], options)
        if filtered.any() and not filtered.all():
            shown.add(row["dataset"])
            yield scores[number], negatives


def _filtered(positive_logit: float, logits: list[float], options: dict[str, Any]) -> np.ndarray:
    """Mask of the candidates that the false-negative filter of the selection stage drops."""
    divisor, margin = options["score_divisor"], options["margin"]
    pool = to_scores(logits, divisor=divisor)
    positive = max(float(to_scores(positive_logit, divisor=divisor)), options["min_positive_score"])
    if options["relax_low_positive"] and positive <= margin:
        return pool >= positive
    return pool > positive - margin


def _card(pool: JudgedPool, chosen: dict[str, bool], options: dict[str, Any]) -> Html:
    filtered = _filtered(pool.positive_logit, pool.logits, options)
    out = np.flatnonzero(filtered)[:_SHOWN_FILTERED].tolist()
    taken = [index for index, item in enumerate(pool.candidates) if item.id in chosen and not filtered[index]]
    indices = sorted(out + taken[: _SHOWN - len(out)])
    judged = to_scores(pool.logits, divisor=options["score_divisor"])
    own = float(to_scores(pool.positive_logit, divisor=options["score_divisor"]))
    candidates = []
    for index in indices:
        mark, style = ("✗ filtered", "bad") if filtered[index] else ("✓ chosen", "good")
        below = [_numbers(float(judged[index]), pool.similarities[index]), element("b", mark, class_=style)]
        candidates.append((pool.candidates[index], below, style))
    positive = show_item(pool.positive, _numbers(own, pool.positive_similarity), style="plain")
    title = f"Candidates: {len(indices)} of {len(pool.candidates)} shown, {int(filtered.sum())} filtered in all"
    left = [element("h4", f"Query ({pool.dataset.replace('_', ' ')})"), show_item(pool.query, style="plain")]
    right = [element("h4", title), show_items(candidates)]
    left += [element("h4", "Its positive", style="margin-top:.7rem"), positive]
    return element("div", element("div", element("div", *left), element("div", *right), class_="sides"), class_="card")


def _numbers(score: float, similarity: float) -> Html:
    lines = (f"P(Yes) {score:.2f}", f"cosine {similarity:.2f}")
    return element("div", *(element("div", line) for line in lines), class_="facts")
