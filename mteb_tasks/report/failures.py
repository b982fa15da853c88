"""Queries that a model got wrong, with their images."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mteb

from mteb_tasks import register
from mteb_tasks.preference_task import CaptionPreferenceTask
from mteb_tasks.report.result_reader import ModelResults
from mteb_tasks.retrieval_task import ItemRetrievalTask
from unime_st.data.items import Item
from unime_st.data.scenes import RetrievalData
from unime_st.report.html import Html, element, join, show_item, show_items

_SHOWN = 3


@dataclass(frozen=True)
class _Miss:
    """A query whose first document is wrong; `gap` is how far the right one is behind.

    A document that was found has an item, a name in the predictions (empty for a caption), a score, and whether it is
    right.
    """

    query: Item
    right: Item
    found: list[tuple[Item, str, float, bool]]
    gap: float


def gallery(model: ModelResults, per_task: int) -> Iterator[Html]:
    """Show the most confident mistakes of each task whose predictions and data are at hand.

    Args:
        model: Results with predictions.
        per_task: Most mistakes to show of one task.

    Yields:
        One block for each task: mistakes, or why there are none to show.
    """
    register()
    for task, file in model.predictions.items():
        try:
            misses, total = _misses(task, json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            yield element("p", f"{task}: the data cannot be read ({reason}).", class_="muted")
            continue
        wrong = len(misses)
        cards = [_card(miss) for miss in sorted(misses, key=lambda miss: -miss.gap)[:per_task]]
        head = f"{task}: {wrong} of {total} wrong"
        yield element("details", element("summary", head), join(cards)) if cards else element("p", head)


def _misses(task: str, predictions: Mapping[str, Any]) -> tuple[list[_Miss], int]:
    made = mteb.get_task(task)
    subsets = [name for name in made.hf_subsets if name in predictions]
    if not subsets:
        raise ValueError("the predictions were made on other data than those at hand, or by another protocol")
    misses, total = [], 0
    for subset in subsets:
        for split, rows in predictions[subset].items():
            if isinstance(made, CaptionPreferenceTask):
                found = list(_wrong_captions(made, subset, split, rows))
            elif isinstance(made, ItemRetrievalTask):
                found = list(_wrong_documents(made.retrieval_data(subset, split), rows))
            else:
                raise ValueError("it is not a task of this package")
            misses += found
            total += len(rows)
    return misses, total


def _wrong_documents(data: RetrievalData, ranked: Mapping[str, Mapping[str, float]]) -> Iterator[_Miss]:
    for query, scores in ranked.items():
        # Ties as mteb breaks them: the larger id first.
        order = sorted(scores, key=lambda name: (scores[name], name), reverse=True)
        right = data.relevant[query]
        if not order or order[0] in right:
            continue
        behind = max((scores[name] for name in right if name in scores), default=min(scores.values()))
        found = [(data.corpus[name], name, scores[name], name in right) for name in order[:_SHOWN]]
        grades = (data.grades or {}).get(query, {})
        best = max(right, key=lambda name: (grades.get(name, 1), scores.get(name, -math.inf)))
        yield _Miss(data.queries[query], data.corpus[best], found, scores[order[0]] - behind)


def _wrong_captions(
    task: CaptionPreferenceTask, subset: str, split: str, rows: Mapping[str, Mapping[str, float]]
) -> Iterator[_Miss]:
    pairs = task.foils(subset, split)
    for row, scores in rows.items():
        caption, foil = (scores[name] for name in task.texts_column_names)
        if caption > foil:
            continue
        pair = pairs[int(row)]
        found = [(Item(text=pair.foil), "", foil, False), (Item(text=pair.caption), "", caption, True)]
        yield _Miss(pair.image, Item(text=pair.caption), found, foil - caption)


def _card(miss: _Miss) -> Html:
    left = [element("h4", "Query"), show_item(miss.query, style="plain")]
    if not any(right for *_, right in miss.found):
        left += [element("h4", "Right answer", style="margin-top:.7rem"), show_item(miss.right, style="plain")]
    documents = []
    for index, (item, name, score, right) in enumerate(miss.found, 1):
        lines = [
            element("div", " ".join([f"{index}.", *([name] if name else []), f"score {score:.3f}"]), class_="facts")
        ]
        lines += [element("b", "✓ right", class_="good")] if right else []
        documents.append((item, lines, "good" if right else "bad" if index == 1 else ""))
    ranked = element("div", element("h4", "What came first"), show_items(documents))
    return element("div", element("div", element("div", *left), ranked, class_="sides"), class_="card")
