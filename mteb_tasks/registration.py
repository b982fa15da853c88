"""Registration of our tasks, models and benchmark with mteb, which has no plug-in interface, see `unime_st.compat`."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from unime_st import compat
from unime_st._after_import import AfterImport
from unime_st.memory import prepare_exit
from unime_st.recipes import RELEASED

if TYPE_CHECKING:
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
    from mteb_tasks.evaluate_hook import with_our_tasks, without_other_data

    for task in registered_tasks():
        compat.add_mteb_task(task)
    _add_models()
    compat.patch_mteb_functions(with_our_tasks, without_other_data, _with_current_models)
    # mteb imports these two late, because the first makes all tasks of all benchmarks: neither is imported for us.
    _once_imported(_BENCHMARKS, _add_mmeb)
    _once_imported(_CLI, _wrap_run)


def _add_models() -> None:
    from mteb_tasks.models import metas

    for name, meta in metas().items():
        compat.add_mteb_model(name, meta)
        if (recipe := RELEASED.get(name)) is not None and recipe.hub_id:
            compat.add_mteb_model(recipe.hub_id, meta)


def _with_current_models(get_model_meta: Callable[..., ModelMeta]) -> Callable[..., ModelMeta]:
    """Wrap ``mteb.get_model_meta``: models of variables are those of the folders that are named now."""
    from mteb_tasks.models import check_variables, follows_variables

    @functools.wraps(get_model_meta)
    def get_current_meta(model_name: str, *args: Any, **kwargs: Any) -> ModelMeta:
        if isinstance(model_name, str) and follows_variables(model_name):
            check_variables(model_name)
            _add_models()
        return get_model_meta(model_name, *args, **kwargs)

    return get_current_meta


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
