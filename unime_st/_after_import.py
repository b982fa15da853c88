"""Import hook that runs an action right after a module has been imported."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class AfterImport:
    """Meta-path finder that runs an action right after a module has been imported.

    It handles only the names it watches, asks the other finders for the real module, and drops a name once that module
    has been executed. Not already at lookup, because ``python -m mteb`` looks up modules that it never executes. An
    action that fails becomes a warning: the program that imported the module must continue.

    Args:
        actions: Maps the full name of a module to a function without arguments.

    Example:
        >>> AfterImport({"mteb": print}).watched
        ('mteb',)
    """

    def __init__(self, actions: Mapping[str, Callable[[], object]]) -> None:
        self._actions = dict(actions)
        self._busy: set[str] = set()

    @property
    def watched(self) -> tuple[str, ...]:
        """Names of the modules still awaited."""
        return tuple(self._actions)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the regular spec of a watched module, with the action appended to its execution."""
        if name not in self._actions or name in self._busy:
            return None
        self._busy.add(name)
        try:
            others = (finder for finder in tuple(sys.meta_path) if finder is not self)
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        finally:
            self._busy.discard(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            action = self._actions.pop(name, None)
            if not self._actions and self in sys.meta_path:
                sys.meta_path.remove(self)
            if action is not None:
                run(name, action)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def run(name: str, action: Callable[[], object]) -> None:
    """Run an action that is about a module; warn if it fails."""
    try:
        action()
    except Exception as error:  # an error here must not break `import mteb` for other programs
        warnings.warn(
            f"unime-st could not register itself with {name} ({type(error).__name__}: {error}); {name} works without "
            "its models and tasks.",
            RuntimeWarning,
            stacklevel=2,
        )
