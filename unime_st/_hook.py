"""Start-up hook: lets plain ``sentence_transformers`` and ``mteb`` programs find this package.

The wheel installs this file as the top-level module ``_unime_st_hook`` next to two one-line files, ``unime_st.pth``
(read by every Python) and ``unime_st.start`` (read instead of it from Python 3.15, PEP 829), which call
:func:`install` at interpreter start. Only the standard library may be imported here, and nothing else may happen
until one of the watched packages is really imported.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, whose import would be the slowest part of this hook
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

SWITCH = "UNIME_ST_AUTOLOAD"
WATCHED = ("sentence_transformers", "mteb")


class AfterImport:
    """Meta-path finder that runs an action right after a module has been imported.

    It answers only for the names it watches, asks the other finders for the real module, and forgets a name once that
    module has been executed. It does so at execution and not when the module is looked up, because ``python -m mteb``
    looks up modules that it never executes.

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
            others = (finder for finder in sys.meta_path if finder is not self)
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
                action()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    """Import the package, which registers itself."""
    try:
        import unime_st

        unime_st.register()
    except Exception as error:  # the program that imported mteb must go on without the aliases, whatever is wrong here
        import warnings

        warnings.warn(
            f"unime-st could not register its models and tasks ({type(error).__name__}: {error}). "
            f"Run `import unime_st` to see the whole error, or set {SWITCH}=0 to turn this hook off.",
            RuntimeWarning,
            stacklevel=2,
        )


def install() -> None:
    """Watch for the import of ``sentence_transformers`` and ``mteb``, unless ``UNIME_ST_AUTOLOAD=0``.

    Example:
        >>> install()  # a second call changes nothing
    """
    import os

    if os.environ.get(SWITCH, "1").strip().lower() in ("0", "false", "no", "off"):
        return
    names = [name for name in WATCHED if name not in sys.modules]
    if names and not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport(dict.fromkeys(names, _register)))
