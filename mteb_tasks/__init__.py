"""Multimodal retrieval tasks for mteb, and the loader that runs any embedding model of this project on them.

`register` makes plain mteb know our tasks, models and benchmark by name; the hook of `unime_st` calls it once mteb has
been imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mteb_tasks.in_process import evaluate
    from mteb_tasks.loader import UniMELoader, wrap
    from mteb_tasks.records_task import RecordsRetrieval
    from mteb_tasks.report.result_frame import results
    from mteb_tasks.two_stage import TwoStage

_HOMES = {
    "UniMELoader": "loader",
    "wrap": "loader",
    "RecordsRetrieval": "records_task",
    "evaluate": "in_process",
    "results": "report.result_frame",
    "TwoStage": "two_stage",
}

__all__ = ["RecordsRetrieval", "TwoStage", "UniMELoader", "evaluate", "register", "results", "wrap"]


def register() -> None:
    """Make our tasks, benchmark and model aliases known to mteb by name. A second call does nothing.

    Example:
        >>> import mteb, mteb_tasks
        >>> mteb_tasks.register()
        >>> mteb.get_task("ScenesVQA").metadata.main_score
        'hit_rate_at_1'
    """
    from mteb_tasks.registration import register_all

    register_all()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"mteb_tasks.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mteb_tasks' has no attribute {name!r}")


# Last, and before any module of this package that subclasses mteb's classes: either import may call `register` (the
# hook of unime_st does so once both are there), which must not find one of those modules half imported.
import unime_st  # noqa: E402, F401, I001
import mteb  # noqa: E402, F401
