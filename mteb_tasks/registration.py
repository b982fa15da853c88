"""Put our tasks, models and benchmark into mteb's registries.

mteb has no plug-in interface. The names used here are private to mteb (hence ``mteb>=2.26,<3``); tests hold them.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from unime_st._after_import import AfterImport

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.benchmarks.benchmark import Benchmark
    from mteb.models import ModelMeta

logger = logging.getLogger(__name__)

_CLI = "mteb.cli.build_cli"
_BENCHMARKS = "mteb.benchmarks.benchmarks"
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
    from mteb_tasks.catalog import registered_tasks
    from mteb_tasks.models import metas

    for task in registered_tasks():
        add_task(task)
    for name, meta in metas().items():
        add_model(name, meta)
    _wrap_evaluate()
    # mteb imports these two late, because the first makes all tasks of all benchmarks: neither is imported for us.
    _once_imported(_BENCHMARKS, _add_mmeb)
    _once_imported(_CLI, _wrap_run)


def add_task(task: type[AbsTask]) -> None:
    """Make mteb find a task class by its name.

    A name that mteb already has stays mteb's. Selections by language, type or modality (``mteb.get_tasks`` without
    names) do not include the task: they would be other evaluations than without this package.

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
    setattr(mteb.tasks, task.__name__, task)


def add_model(name: str, meta: ModelMeta) -> None:
    """Make mteb find a model by its short and by its full name; a name that mteb already has stays mteb's.

    Args:
        name: What users pass to ``mteb run -m``.
        meta: Its description; mteb reads results back by ``meta.name``.
    """
    from mteb.models.model_implementations import MODEL_REGISTRY

    MODEL_REGISTRY.setdefault(name, meta)
    if meta.name is not None:
        MODEL_REGISTRY.setdefault(meta.name, meta)


def add_benchmark(benchmark: Benchmark) -> None:
    """Make mteb find a benchmark by its name.

    Args:
        benchmark: The benchmark.
    """
    import mteb.benchmarks.benchmarks as home

    importlib.import_module("mteb.benchmarks.get_benchmark")
    lookup: Any = sys.modules["mteb.benchmarks.get_benchmark"]
    attribute = "".join(letter if letter.isalnum() else "_" for letter in benchmark.name).strip("_").upper()
    if not hasattr(home, attribute):
        setattr(home, attribute, benchmark)
        lookup._build_registry.cache_clear()
        lookup._build_aliases_registry.cache_clear()


def _once_imported(module: str, action: Callable[[], None]) -> None:
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, AfterImport({module: action}))


def _add_mmeb() -> None:
    from mteb_tasks.mmeb.benchmark import make_benchmark

    add_benchmark(make_benchmark())


def _wrap_evaluate() -> None:
    """Let ``mteb.evaluate`` run plain SentenceTransformers on our tasks with their images."""
    import mteb

    from mteb_tasks.evaluate_hook import with_our_tasks

    # The attribute `mteb.evaluate` is the function of that name, which hides the module.
    home: Any = sys.modules["mteb.evaluate"]
    home.evaluate = mteb.evaluate = with_our_tasks(home.evaluate)


def _wrap_run() -> None:
    """Let ``mteb run`` end with a table of our tasks' scores: mteb's own command prints none."""
    from mteb_tasks.run_hook import with_scores

    command: Any = sys.modules[_CLI]
    command.run = with_scores(command.run)
