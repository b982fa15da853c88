"""Top documents of UniME-V2 and of the control for the same queries, as a section of the demo's report."""

from __future__ import annotations

from collections.abc import Iterator

from train_scripts.demo.results import CONTROL, TASKS
from train_scripts.demo.seed import Seed
from train_scripts.demo.settings import PAIR_ORDERS
from unime_st.data.scenes import RetrievalData, retrieval_data
from unime_st.files import read_json
from unime_st.report.html import Html, element, join, show_item, show_items

_TOP, _PER_OUTCOME = 4, 2
_SHOWN = {"UniME-V2": "v2", "control, equal steps": CONTROL}


def retrieval_gallery(run: Seed) -> Html:
    """Cards of the first queries of each direction that UniME-V2 answers better, and of the first ones it answers worse.

    Args:
        run: A seed with the evaluations of both models.
    """
    parts = []
    for task in PAIR_ORDERS:
        data = retrieval_data(task, size=run.arguments.eval_size)
        kept = {name: run.folder / "eval" / model for name, model in _SHOWN.items()}
        ours, control = (read_json(folder / "results.json")["ndcg"][task] for folder in kept.values())
        gains = {query: ours[query] - control[query] for query in data.queries}
        found = {
            name: read_json(folder / f"{TASKS[task]}_predictions.json")["default"]["test"]
            for name, folder in kept.items()
        }
        counts = [sum(gain > 0 for gain in gains.values()), sum(gain < 0 for gain in gains.values())]
        words = f"{task.replace('_', ' ')}: of {len(gains)} queries, UniME-V2 is better in {counts[0]}, worse in {counts[1]}"
        parts.append(element("h3", words))
        for sign in (1, -1):
            queries = [query for query, gain in gains.items() if sign * gain > 0][:_PER_OUTCOME]
            parts += [_card(data, query, found, "better" if sign > 0 else "worse") for query in queries]
    return join(parts)


def _card(data: RetrievalData, query: str, found: dict[str, dict[str, dict[str, float]]], outcome: str) -> Html:
    left = [element("h4", f"Query: UniME-V2 is {outcome}"), show_item(data.queries[query], style="plain")]
    sides = [element("div", *left)]
    for name, ranked in found.items():
        shown = show_items(_documents(data, query, ranked[query]))
        sides.append(element("div", element("h4", f"First {_TOP} of {name}"), shown))
    return element("div", element("div", *sides, class_="halves"), class_="card")


def _documents(data: RetrievalData, query: str, scores: dict[str, float]) -> Iterator[tuple]:
    for name in sorted(scores, key=scores.__getitem__, reverse=True)[:_TOP]:
        right = name in data.relevant[query]
        mark = [element("b", "✓ right", class_="good")] if right else []
        below = [element("div", f"score {scores[name]:.2f}", class_="facts"), *mark]
        yield data.corpus[name], below, "good" if right else ""
