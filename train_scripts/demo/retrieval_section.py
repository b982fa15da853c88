"""Top documents of two models for the same queries, as sections of the demo's report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from train_scripts.demo.results import TASKS
from unime_st.data.items import Item
from unime_st.data.scenes import RetrievalData, retrieval_data
from unime_st.report.html import Html, element, join, show_item, show_items, table

Ranking = Mapping[str, Sequence[tuple[str, float]]]
"""Documents and scores per query, best first."""

_TOP, _PER_TASK = 3, 2
_OUTCOMES = ("both right", "only V2 right", "only the control right", "both wrong")


@dataclass(frozen=True)
class Comparison:
    """Rankings of UniME-V2 and of the control on a task, and the queries grouped by which of them is right.

    Args:
        task: Key of :data:`~train_scripts.demo.results.TASKS`.
        data: Queries, documents and right answers.
        ours: Rankings of UniME-V2.
        control: Rankings of the control.
        outcomes: Queries of each of the four outcomes, in the order of the data.
    """

    task: str
    data: RetrievalData
    ours: Ranking
    control: Ranking
    outcomes: Mapping[str, list[str]]


def read_rankings(folder: Path, task: str) -> Ranking | None:
    """Read the predictions that ``mteb_tasks.in_process.evaluate`` left for one model and task.

    Args:
        folder: Folder of the model's evaluation.
        task: Key of :data:`~train_scripts.demo.results.TASKS`.

    Returns:
        The documents of each query, best first; None if there is no file.

    Raises:
        ValueError: If the file does not hold the predictions of a retrieval task.
    """
    path = folder / f"{TASKS[task]}_predictions.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["default"]["test"]
        # A stable sort: equal scores keep the order in which the model returned them.
        return {query: sorted(scores.items(), key=lambda pair: -pair[1]) for query, scores in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not the predictions of a retrieval task ({error!r}); remove it and evaluate again"
        ) from error


def compare(folder: Path, size: int, *, ours: str = "v2", control: str = "in_batch") -> list[Comparison]:
    """Compare two models on all tasks for which both left predictions.

    Args:
        folder: Folder of one seed.
        size: Queries of each task.
        ours: Key of the first model. Defaults to "v2".
        control: Key of the second model. Defaults to "in_batch".

    Returns:
        list[Comparison]: One for each task, in the order of the tasks.

    Raises:
        ValueError: If predictions are malformed or were made on other queries or documents than those of ``size``.
    """
    found = []
    for task in TASKS:
        pair = [read_rankings(folder / "eval" / model, task) for model in (ours, control)]
        if pair[0] is None or pair[1] is None:
            continue
        data = retrieval_data(task, size=size, seed=0)
        for model, ranking in zip((ours, control), pair):
            unknown = {name for documents in (ranking or {}).values() for name, _ in documents} - set(data.corpus)
            if set(ranking or {}) != set(data.queries) or unknown:
                raise ValueError(
                    f"{folder}: the predictions of {model} for {task} are not about the {size} queries of "
                    "settings.eval_size; evaluate again, or correct the setting"
                )
        found.append(Comparison(task, data, pair[0], pair[1], _outcomes(data, pair[0], pair[1])))
    return found


def _outcomes(data: RetrievalData, ours: Ranking, control: Ranking) -> dict[str, list[str]]:
    outcomes: dict[str, list[str]] = {name: [] for name in _OUTCOMES}
    for query, relevant in data.relevant.items():
        hits = [bool(ranking[query]) and ranking[query][0][0] in relevant for ranking in (ours, control)]
        outcomes[_OUTCOMES[2 * (not hits[0]) + (not hits[1])]].append(query)
    return outcomes


def outcome_table(comparisons: Sequence[Comparison]) -> Html:
    """Number of queries per task by which model is right.

    Args:
        comparisons: From :func:`compare`.

    Returns:
        Html: A table with one row for each task.
    """
    rows = [[item.task.replace("_", " "), *(len(item.outcomes[name]) for name in _OUTCOMES)] for item in comparisons]
    return table(["task", *_OUTCOMES], [("", rows)], caption="Number of queries by whose first document is right")


def gallery(comparisons: Sequence[Comparison], outcomes: Sequence[str]) -> Html:
    """Cards of the first queries of each task with given outcomes.

    Args:
        comparisons: From :func:`compare`.
        outcomes: Which outcomes to show, such as "only V2 right"; of each task, two queries in all, taken from the
            outcomes in turn.

    Returns:
        Html: Cards, or a line that says that there is none.
    """
    cards = []
    for comparison in comparisons:
        queues = [comparison.outcomes[name][:_PER_TASK] for name in outcomes]
        in_turn = [queue[index] for index in range(_PER_TASK) for queue in queues if index < len(queue)]
        cards += [_card(comparison, query) for query in in_turn[:_PER_TASK]]
    return join(cards) if cards else element("p", "There is no such query.")


def _card(comparison: Comparison, query: str) -> Html:
    data = comparison.data
    lost = data.relevant[query] - {name for name, _ in _best(comparison, query)}
    left = [
        element("h4", f"Query ({comparison.task.replace('_', ' ')})"),
        show_item(data.queries[query], style="plain"),
    ]
    if lost == data.relevant[query]:  # neither model shows a right document, so it is shown here
        left += [element("h4", "A right answer", style="margin-top:.7rem")]
        left += [show_item(data.corpus[min(lost)], style="plain")]
    sides = [element("div", *left)]
    for name, ranking in (("UniME-V2", comparison.ours), ("control, equal steps", comparison.control)):
        documents = [_document(data, query, index, *found) for index, found in enumerate(ranking[query][:_TOP], 1)]
        sides.append(element("div", element("h4", f"First {_TOP} of {name}"), show_items(documents)))
    return element("div", element("div", *sides, class_="halves"), class_="card")


def _best(comparison: Comparison, query: str) -> list[tuple[str, float]]:
    return [*comparison.ours[query][:_TOP], *comparison.control[query][:_TOP]]


def _document(data: RetrievalData, query: str, index: int, name: str, score: float) -> tuple[Item, list[Html], str]:
    right = name in data.relevant[query]
    mark = [element("b", "✓ right", class_="good")] if right else []
    return data.corpus[name], [element("div", f"{index}. score {score:.2f}", class_="facts"), *mark], "good" * right
