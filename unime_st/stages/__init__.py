"""Stages of both papers: one file each, with the options it reads and the function that does the work.

A stage is a command (``unime STAGE [CONFIG] [--option value ...]``), a script (``train_scripts/STAGE.py``, the same
words) and a function of this package. Functions and options are loaded when they are first used.

Example:
    ::

        from unime_st.stages import SoftLabelArguments, train_soft_labels

        folder = train_soft_labels(SoftLabelArguments(data="runs/rows", output="runs/soft_labels", max_steps=60))
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class StageEntry:
    """Where a stage is found.

    Args:
        function: Name of its function.
        options: Name of the dataclass of its options.
        example: Words after ``unime STAGE``, for the help.
        positional: Option whose values may stand first, without its name. Defaults to none.
    """

    function: str
    options: str
    example: str
    positional: str = ""


STAGES: dict[str, StageEntry] = {
    "import_data": StageEntry("run_import", "ImportArguments", "own --source pairs.jsonl --output runs/records"),
    "mine": StageEntry("run_mine", "MineArguments", "tiny --data runs/records --output runs/pools"),
    "judge": StageEntry("run_judge", "JudgeArguments", "tiny --data runs/pools --output runs/rows"),
    "distill": StageEntry("train_distill", "DistillArguments", "tiny --data runs/nli --teacher MODEL"),
    "hard_negatives": StageEntry("train_hard_negatives", "HardNegativeArguments", "tiny --data runs/records"),
    "in_batch": StageEntry("train_in_batch", "InBatchArguments", "tiny --data runs/records"),
    "soft_labels": StageEntry("train_soft_labels", "SoftLabelArguments", "tiny --data runs/rows"),
    "reranker": StageEntry("train_reranker", "RerankerArguments", "tiny --data runs/rows"),
    "merge": StageEntry(
        "run_merge", "MergeArguments", "runs/a runs/b --weights 0.7 0.3 --output runs/merged", positional="models"
    ),
}
"""The stages by name: file of this package, script, folder of configurations and subcommand of ``unime``."""

_HOMES = {name: stage for stage, entry in STAGES.items() for name in (entry.function, entry.options)}
__all__ = ["STAGES", "StageEntry", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
