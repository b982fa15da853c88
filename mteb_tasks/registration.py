"""Put our tasks, models and benchmark into mteb's registries.

mteb has no plug-in interface. The names used here are private to mteb (hence ``mteb>=2.26,<3``); tests hold them.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

logger = logging.getLogger(__name__)

_done = False


def register_all() -> None:
    """Register everything once; see `mteb_tasks.register`.

    Raises:
        RuntimeError: If mteb is too old or too new to have the registries.
    """
    global _done
    if _done:
        return
    # First, because importing tasks and models asks mteb for tasks, which may come back here.
    _done = True
    from mteb_tasks.scenes import SCENES_TASKS

    for task in SCENES_TASKS:
        add_task(task)


def add_task(task: type[AbsTask]) -> None:
    """Make mteb find a task class by its name.

    A name that mteb already has stays mteb's.

    Args:
        task: The class.

    Raises:
        RuntimeError: If mteb has no task registry where we know it.
    """
    import mteb.tasks

    importlib.import_module("mteb.get_tasks")
    # The attribute `mteb.get_tasks` is the function of that name, which hides the module.
    home: Any = sys.modules["mteb.get_tasks"]
    registry = getattr(home, "_TASKS_REGISTRY", None)
    if registry is None:
        raise RuntimeError("this version of mteb keeps its tasks elsewhere: install mteb>=2.26,<3")
    name = task.metadata.name
    if name in registry:
        if registry[name] is not task:
            logger.warning("mteb already has a task named %s: ours is not registered", name)
        return
    registry[name] = task
    home.TASK_LIST = (*home.TASK_LIST, task)
    setattr(mteb.tasks, task.__name__, task)
