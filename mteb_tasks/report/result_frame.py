"""Scores in result folders as a pandas DataFrame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from mteb_tasks.report.result_reader import ModelResults, read_results

_COLUMNS = ["model", "revision", "setting", "name", "kind", "score", "published", "difference", "data", "mteb"]
_TEXTS = ("model", "revision", "setting", "name", "data", "mteb")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def results(folders: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """Read the scores below one or several result folders.

    Args:
        folders: Output folder of ``mteb run``, or several of them.

    Returns:
        One row for each score: ``model``, ``revision``, ``setting`` (further part of mteb's key, such as the depth of
        a reranking), ``name`` (task, category or mean), ``kind`` ("task", "mean" or "metric"), ``score`` and
        ``published`` in percent (NaN where nothing was published), ``difference`` to the published score in points,
        ``data`` (revision of the data) and ``mteb`` (version). The order is that of the papers' tables.

    Raises:
        FileNotFoundError: If a folder does not exist, or none holds a result.
        ValueError: If a result is damaged; names the file.

    Example:
        ::

            import mteb_tasks

            scores = mteb_tasks.results("results")
            print(scores.pivot_table(index="name", columns="model", values="score"))
    """
    return score_frame(read_results([folders] if isinstance(folders, (str, Path)) else folders))


def score_frame(models: Sequence[ModelResults]) -> pd.DataFrame:
    """Scores of some models; columns as for `results`."""
    return pd.DataFrame([row for model in models for row in _rows(model)], columns=_COLUMNS)


def to_csv(frame: pd.DataFrame) -> str:
    """The frame as CSV. A text that a spreadsheet would run as a formula gets an apostrophe before it."""
    texts = {name: [f"'{cell}" if str(cell).startswith(_FORMULA) else cell for cell in frame[name]] for name in _TEXTS}
    return frame.assign(**texts, score=frame["score"].map("{:.4f}".format)).to_csv(index=False)


def _rows(model: ModelResults) -> Iterator[tuple[object, ...]]:
    head = (model.name, model.revision, model.setting)
    for row in model.rows:
        task = next((name for name in model.versions if row.name == name or row.name.startswith(f"{name} ")), "")
        beside = (row.published, row.difference)
        yield (
            *head,
            row.name,
            "mean" if row.is_mean else "task",
            row.score,
            *beside,
            *model.versions.get(task, ("", "")),
        )
    for task, metrics in model.captions.items():
        for name, value in metrics.items():
            yield (*head, f"{task} {name}", "metric", value, None, None, *model.versions[task])
