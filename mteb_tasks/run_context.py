"""State of the ``mteb run`` command in progress: its tasks of this package, the model, the folder for predictions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import mteb

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.models import ModelMeta

_CURRENT: ContextVar[CurrentRun | None] = ContextVar("mteb_run", default=None)


@dataclass
class CurrentRun:
    """One ``mteb run`` command.

    Args:
        output_folder: Where mteb writes the results.
        tasks: Tasks of this package that were handed to ``mteb.evaluate``.
        model_meta: mteb's description of the model that was handed over with them.
    """

    output_folder: str
    tasks: list[AbsTask] = field(default_factory=list)
    model_meta: ModelMeta | None = None

    @property
    def cache(self) -> mteb.ResultCache:
        """mteb's results of this run."""
        return mteb.ResultCache(self.output_folder)

    def prediction_folder(self, meta: ModelMeta) -> Path:
        """Folder ``predictions/<model>/<revision>`` beside mteb's ``results``; it may not exist yet.

        Args:
            meta: Description of the model.
        """
        name = str(meta.name).replace("/", "__")
        return self.cache.cache_path / "predictions" / name / (meta.revision or "no_revision_available")


@contextmanager
def new_run(output_folder: str) -> Iterator[CurrentRun]:
    """Make a run the current one while a command runs.

    Args:
        output_folder: Where mteb writes the results.

    Yields:
        The run.
    """
    run = CurrentRun(output_folder)
    token = _CURRENT.set(run)
    try:
        yield run
    finally:
        _CURRENT.reset(token)


def current_run() -> CurrentRun | None:
    """Return the run in progress, or None outside of ``mteb run``."""
    return _CURRENT.get()
