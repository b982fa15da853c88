"""Registration of our tasks, models and benchmark with mteb, which has no plug-in interface, see `unime_st.compat`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from unime_st import compat
from unime_st._after_import import AfterImport
from unime_st.memory import prepare_exit
from unime_st.recipes import RELEASED

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
    from mteb_tasks.evaluate_hook import with_our_tasks, without_other_data
    from mteb_tasks.models import metas

    for task in registered_tasks():
        compat.add_mteb_task(task)
    for name, meta in metas().items():
        compat.add_mteb_model(name, meta)
        if (recipe := RELEASED.get(name)) is not None and recipe.hub_id:
            compat.add_mteb_model(recipe.hub_id, meta)
    compat.patch_mteb_evaluate(with_our_tasks, without_other_data)
    # mteb imports these two late, because the first makes all tasks of all benchmarks: neither is imported for us.
    _once_imported(_BENCHMARKS, _add_mmeb)
    _once_imported(_CLI, _wrap_run)


def _once_imported(module: str, action: Callable[[], None]) -> None:
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, AfterImport({module: action}))


def _add_mmeb() -> None:
    from mteb_tasks.mmeb.benchmark import make_benchmark
    from mteb_tasks.mmeb_v2.aggregate import make_v2_benchmark

    compat.add_mteb_benchmark(make_benchmark())
    compat.add_mteb_benchmark(make_v2_benchmark())


def _wrap_run() -> None:
    """Let ``mteb run`` end with a table of our tasks' scores: mteb's own command prints none."""
    from mteb_tasks.run_hook import with_scores

    prepare_exit()
    compat.patch_mteb_run(with_scores)
