"""Results of a demo run: validation, mean and standard deviation over seeds, and the Markdown table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unime_st.data.scenes import FOIL_CATEGORIES

MODELS = {
    "base": "untrained (unime-tiny)",
    "stage1": "+ stage 1 (distilled)",
    "stage2": "+ stage 2 (hard negatives)",
    "in_batch": "control: in-batch InfoNCE, equal steps",
    "in_batch_compute": "control: in-batch InfoNCE, equal compute",
    "v2": "UniME-V2 (mined + judged + soft labels)",
    "v2_reranker": "UniME-V2 + reranker",
    "everything": "everything we know (soup + judge, both orders, fused)",
}
"""Display names of the compared models, in display order; the last is for all arms only."""

EVERYTHING = "everything"

REPORT = "report.html"
"""File name of the report in the folder of a run."""

CONTROLS = ("in_batch", "in_batch_compute")

TASKS = {
    "short_t2i": "ScenesShortT2IRetrieval",
    "short_i2t": "ScenesShortI2TRetrieval",
    "long_t2i": "ScenesLongT2IRetrieval",
    "long_i2t": "ScenesLongI2TRetrieval",
    "vqa": "ScenesVQA",
    "grounding": "ScenesGrounding",
}
"""Name in mteb of each retrieval task."""

COLUMNS = {
    "short t2i": ("short_t2i", "hit_rate_at_1"),
    "short i2t": ("short_i2t", "hit_rate_at_1"),
    "long t2i": ("long_t2i", "hit_rate_at_1"),
    "long i2t": ("long_i2t", "hit_rate_at_1"),
    "replace": ("compositional", "replace"),
    "swap": ("compositional", "swap"),
    "add": ("compositional", "add"),
    "VQA": ("vqa", "hit_rate_at_1"),
    "grounding": ("grounding", "hit_rate_at_1"),
}
"""Task and metric of each column of the table."""

MEAN = "mean"

# Stages that a model takes beyond the one it starts from, where they are not the one of its own name.
_STAGES = {
    "v2": ("mine", "judge", "select", "v2"),
    EVERYTHING: ("mine", "judge", "select", "v2", "in_batch", "soup"),
}
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "seed": int,
    "task": str,
    "metric": str,
    "value": (int, float),
}


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation of a number over seeds.

    Args:
        mean: Mean over the seeds.
        spread: Sample standard deviation over the seeds; None where there is one seed.
    """

    mean: float
    spread: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise one value for each seed."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def parts(self, *, scale: float = 100.0, signed: bool = False) -> tuple[str, str]:
        """Format mean and spread; the spread is empty for one seed.

        Args:
            scale: Factor before rounding to one decimal. Defaults to 100, for percent.
            signed: Write a plus sign as well.
        """
        rounded = round(scale * self.mean, 1) + 0.0  # no sign on a zero
        mean = ("+" if signed and rounded > 0 else "") + f"{rounded:.1f}".replace("-", "−")
        return mean, "" if self.spread is None else f"±{scale * self.spread:.1f}"


class DemoResults:
    """Validated content of a demo's ``results.json``.

    Args:
        content: The decoded file: "rows" of model, seed, task, metric and value; "seconds" by stage; optionally
            "seconds_by_seed", "settings", "versions", "machine", "notes" and "peak_rss_mb".

    Raises:
        ValueError: If a row is malformed or duplicated; the message names it.

    Example:
        >>> from train_scripts.demo.results import DemoResults
        >>> row = {"model": "v2", "seed": 0, "task": "vqa", "metric": "hit_rate_at_1", "value": 0.5}
        >>> DemoResults({"rows": [row], "seconds": {}}).summary("v2", "VQA")
        Summary(mean=0.5, spread=None)
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        rows = content.get("rows")
        if not isinstance(rows, list) or not rows:
            raise ValueError(
                'results.json: expected a list of results under "rows"; the demo has not evaluated a model'
            )
        self._values: dict[tuple[str, str, str], dict[int, float]] = {}
        for number, row in enumerate(rows):
            self._add(number, row)
        present = {model for model, _, _ in self._values}
        unknown = sorted(present - set(MODELS))
        if unknown:
            raise ValueError(f"results.json: unknown model {unknown[0]!r}; expected one of {', '.join(MODELS)}")
        self.models = [model for model in MODELS if model in present]
        self.seeds = sorted({seed for values in self._values.values() for seed in values})
        cells = {(task, metric) for _, task, metric in self._values}
        self.columns = [title for title, cell in COLUMNS.items() if cell in cells]
        self.categories = [name for name in FOIL_CATEGORIES if ("compositional", name) in cells]

    def _add(self, number: int, row: Any) -> None:
        for name, kind in _FIELDS.items():
            value = row.get(name) if isinstance(row, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"results.json, row {number}: {name} is {value!r}; expected {', '.join(_FIELDS)}")
        if not 0.0 <= row["value"] <= 1.0:  # catches NaN as well
            raise ValueError(f"results.json, row {number}: value is {row['value']!r}, expected a fraction in [0, 1]")
        values = self._values.setdefault((row["model"], row["task"], row["metric"]), {})
        if row["seed"] in values:
            raise ValueError(
                f"results.json, row {number}: {row['model']}, {row['task']}, seed {row['seed']} occurs twice"
            )
        values[row["seed"]] = float(row["value"])

    def values(self, model: str, column: str) -> dict[int, float]:
        """One value per seed.

        Args:
            model: Key of :data:`MODELS`.
            column: A title of :data:`COLUMNS`, "mean" (over all columns that any model has; only seeds that have all
                of them), or a compositional category.
        """
        if column == MEAN:
            parts = [self.values(model, title) for title in self.columns]
            complete = [seed for seed in self.seeds if parts and all(seed in part for part in parts)]
            return {seed: statistics.fmean(part[seed] for part in parts) for seed in complete}
        task, metric = COLUMNS.get(column, ("compositional", column))
        return self._values.get((model, task, metric), {})

    def summary(self, model: str, column: str) -> Summary | None:
        """Mean and spread over seeds, None if there is no value."""
        values = self.values(model, column)
        return Summary.of(list(values.values())) if values else None

    def difference(self, model: str, other: str, column: str) -> Summary | None:
        """Paired difference ``model`` minus ``other`` over seeds; None if they share no seed."""
        ours, theirs = self.values(model, column), self.values(other, column)
        paired = [ours[seed] - theirs[seed] for seed in self.seeds if seed in ours and seed in theirs]
        return Summary.of(paired) if paired else None

    def stage_seconds(self) -> dict[str, Summary]:
        """Seconds per seed of each stage, in the order of the file."""
        by_seed = self.content.get("seconds_by_seed") or {"all": self.content.get("seconds") or {}}
        found: dict[str, list[float]] = {}
        for stages in by_seed.values():
            for stage, seconds in stages.items():
                found.setdefault(stage, []).append(float(seconds))
        return {stage: Summary.of(values) for stage, values in found.items()}

    def model_seconds(self, model: str) -> float | None:
        """Seconds that a model takes beyond the one it starts from; None for the untrained one.

        UniME-V2's include mining, judging and selection.
        """
        seconds = self.stage_seconds()
        own = [seconds[stage].mean for stage in _STAGES.get(model, (model,)) if stage in seconds]
        return sum(own) if own else None

    def setting(self, name: str, meaning: str) -> int:
        """A positive integer of the settings that the report needs.

        Args:
            name: Its key.
            meaning: What it is, for the error.

        Raises:
            ValueError: If it is missing or not positive.
        """
        value = (self.content.get("settings") or {}).get(name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"results.json: settings.{name} is {value!r}; expected {meaning}")
        return value

    def chance_band(self) -> float:
        """Two standard errors of an accuracy of one half on one compositional category."""
        return 2.0 * math.sqrt(0.25 / self.setting("foil_size", "the number of pairs in each compositional category"))

    def at_chance(self, model: str) -> list[str]:
        """Compositional categories in which a model cannot be told from guessing."""
        band, found = self.chance_band(), {name: self.summary(model, name) for name in self.categories}
        return [name for name, summary in found.items() if summary and abs(summary.mean - 0.5) <= band]

    def below_chance(self, model: str) -> list[str]:
        """Compositional categories in which a model prefers the wrong caption."""
        band, found = self.chance_band(), {name: self.summary(model, name) for name in self.categories}
        return [name for name, summary in found.items() if summary and summary.mean < 0.5 - band]


def render_table(results: Mapping[str, Any]) -> str:
    """Render the demo's result table as aligned Markdown.

    Args:
        results: The decoded ``results.json``, see :class:`DemoResults`.

    Returns:
        str: One row per model, in percent: mean over seeds, with ± the standard deviation if there are several. Seconds
        are those that a model takes beyond the one it starts from.

    Raises:
        ValueError: If the results are malformed.

    Example:
        >>> from train_scripts.demo.results import render_table
        >>> row = {"model": "base", "seed": 0, "task": "vqa", "metric": "hit_rate_at_1", "value": 0.25}
        >>> print(render_table({"rows": [row], "seconds": {}}))
        | model                  |  VQA | mean | seconds |
        | :--------------------- | ---: | ---: | ------: |
        | untrained (unime-tiny) | 25.0 | 25.0 |       – |
    """
    found = DemoResults(results)
    columns = [*found.columns, MEAN]
    lines = [["model", *columns, "seconds"]]
    for model in found.models:
        cells = [_plain(found.summary(model, column)) for column in columns]
        seconds = found.model_seconds(model)
        lines.append([MODELS[model], *cells, "–" if seconds is None else f"{seconds:.0f}"])
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = [":" + "-" * (width - 1) if not index else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
    padded = [
        [cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(zip(line, widths))]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


def _plain(summary: Summary | None) -> str:
    return "–" if summary is None else " ".join(filter(None, summary.parts()))
