"""Read what mteb left in result folders."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mteb_tasks.scores import Row, Scores, caption_metrics, score_rows
from unime_st.files import Json

_PREDICTIONS = "_predictions.json"


@dataclass
class ModelResults:
    """The results of one model at one revision.

    Args:
        name: Name that mteb files it under.
        revision: Its revision.
        setting: Further part of mteb's key, for instance the depth of a reranking; "" for none.
        scores: ``{task: {subset: {metric: value}}}`` of the newest data of each task.
        versions: Data revision and mteb version of each task.
        superseded: Tasks of which scores on other data were left out.
        predictions: File with the ranked documents of each query, by task.
        label: How the report calls it.
    """

    name: str
    revision: str
    setting: str = ""
    scores: Scores = field(default_factory=dict)
    versions: dict[str, tuple[str, str]] = field(default_factory=dict)
    superseded: list[str] = field(default_factory=list)
    predictions: dict[str, Path] = field(default_factory=dict)
    label: str = ""

    @property
    def alias(self) -> str:
        """Name that published numbers are looked up by."""
        return self.name.removeprefix("unime/")

    @property
    def rows(self) -> list[Row]:
        """Scores in the order of the papers' tables."""
        return score_rows(self.scores, self.alias)

    @property
    def captions(self) -> dict[str, dict[str, float]]:
        """Shares of right captions and images among the first ones; see `caption_metrics`."""
        return caption_metrics(self.scores)


def read_results(folders: Iterable[str | Path]) -> list[ModelResults]:
    """Collect the results of all models below some folders.

    Args:
        folders: Output folders of ``mteb run``, or any folder of or below one. What is not a result is passed over.

    Returns:
        One entry for each model and revision, in the order in which they are found.

    Raises:
        FileNotFoundError: If a folder does not exist, or none holds a result.
        ValueError: If a result is damaged; names the file.
    """
    models: dict[tuple[str, str, str], ModelResults] = {}
    predictions: list[Path] = []
    indices = [Path(folder) for folder in folders]
    for folder in indices:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; give the --output-folder of `mteb run`")
        for file in sorted(folder.rglob("*.json")):
            if file.name.endswith(_PREDICTIONS):
                predictions.append(file)
            elif (content := _read(file)) is not None:
                key = _identity(file)
                _add(models.setdefault(key, ModelResults(*key)), content, file)
    found = [model for model in models.values() if model.scores]
    if not found:
        listed = ", ".join(map(str, indices))
        raise FileNotFoundError(f"no results of mteb in {listed}; give the --output-folder of `mteb run`")
    _label(found)
    _attach(found, predictions)
    return found


def _read(file: Path) -> Json | None:
    """Content of a result file, None if it is another kind of file."""
    if file.name == "model_meta.json":
        return None
    content = _content(file)
    known = isinstance(content, dict) and isinstance(content.get("scores"), dict) and "task_name" in content
    return content if known else None


def _content(file: Path) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # lone surrogates cannot be written again
        return content
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): remove it and run the evaluation again") from error


def _identity(file: Path) -> tuple[str, str, str]:
    """Name, revision and setting: from mteb's description of the model, else from the names of the folders."""
    for folder in list(file.parents)[:4]:
        meta = folder / "model_meta.json"
        if meta.is_file():
            content = _content(meta)
            inner = file.parent.relative_to(folder).as_posix()
            setting = "" if inner == "." else inner.removeprefix("experiments/")
            return str(content.get("name")), str(content.get("revision")), setting
    return file.parent.parent.name.replace("__", "/"), file.parent.name, ""


def _add(model: ModelResults, content: Json, file: Path) -> None:
    task = str(content["task_name"])
    try:
        rows = [row for split in content["scores"].values() for row in split]
        data_of = [str(row["hf_subset"]).partition("local-")[2] for row in rows]
        # One file holds the scores on all data that a task was ever run on, the newest last.
        splits = [split for split, found in content["scores"].items() for _ in found]
        newest = {
            _row_name(row, split, len(content["scores"])): dict(row)
            for row, split, data in zip(rows, splits, data_of)
            if data == data_of[-1]
        }
        if any(row["main_score"] is None for row in newest.values()):
            return  # an aggregate without all its parts
        for row in newest.values():
            row["main_score"] = float(row["main_score"])
            if not math.isfinite(row["main_score"]):
                raise ValueError(f"main_score is {row['main_score']}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a result of mteb ({error!r}): remove it and evaluate again") from error
    if newest:
        revision = data_of[-1] or str(content.get("dataset_revision"))
        before, _ = model.versions.get(task, (revision, ""))
        # Another folder may hold scores on the same data under another protocol.
        model.scores[task] = {**(model.scores.get(task, {}) if before == revision else {}), **newest}
        model.versions[task] = (revision, str(content.get("mteb_version")))
        if task not in model.superseded and (len(set(data_of)) > 1 or before != revision):
            model.superseded.append(task)


def _row_name(row: Mapping[str, object], split: str, splits: int) -> str:
    """Name of a subset; tasks of others may have several splits, which must not take each other's place."""
    return str(row["hf_subset"]) if splits == 1 else f"{row['hf_subset']} ({split})"


def _label(models: list[ModelResults]) -> None:
    aliases = [model.alias for model in models]
    for model in models:
        parts = [model.alias]
        if aliases.count(model.alias) > 1:
            parts += [model.revision[:8], model.setting]
        model.label = " ".join(filter(None, parts))


def _attach(models: list[ModelResults], files: list[Path]) -> None:
    """Give every model the predictions that carry its name and revision."""
    for file in files:
        try:
            made_by: Mapping[str, object] = json.loads(file.read_text(encoding="utf-8"))["mteb_model_meta"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}): remove it, or evaluate again") from error
        task = file.name.removesuffix(_PREDICTIONS)
        for model in models:
            if (model.name, model.revision) == (
                made_by["model_name"],
                str(made_by["revision"]),
            ) and task in model.scores:
                model.predictions[task] = file
