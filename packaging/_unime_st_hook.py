"""Start-up hook of unime-st: lets plain ``sentence_transformers`` and ``mteb`` programs find its models and tasks.

``unime_st.pth`` (read by every Python) and ``unime_st.start`` (read instead of it from Python 3.15 on, PEP 829) call
:func:`install` at interpreter start. It only puts a finder on ``sys.meta_path``. When a program looks for one of the
two packages for the first time, the finder removes itself and imports ``unime_st``, which registers its model names,
model types and tasks at the end of that import. Programs that use neither package are unaffected. ``UNIME_ST_AUTOLOAD=0`` turns it off; uninstalling unime-st removes it.

Standard library only.
"""

from __future__ import annotations

import sys

SWITCH = "UNIME_ST_AUTOLOAD"
WATCHED = ("sentence_transformers", "mteb")


class Finder:
    """Imports ``unime_st`` when one of the watched packages is looked for, then lets the lookup go on."""

    def find_spec(self, name, path=None, target=None):
        """Return the spec that the other finders give, or None for a package that is not watched."""
        if name not in WATCHED or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        try:
            import unime_st  # noqa: F401
        except Exception as error:
            import warnings

            warnings.warn(
                f"unime-st could not be loaded ({type(error).__name__}: {error}), so its models and tasks are missing. "
                f"`import unime_st` shows the whole error, {SWITCH}=0 turns this hook off.",
                RuntimeWarning,
                stacklevel=2,
            )
        for finder in list(sys.meta_path):
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
        return None


def install():
    """Watch for the two packages, unless switched off or too late."""
    import os

    off = os.environ.get(SWITCH, "1").strip().lower() in ("0", "false", "no", "off")
    late = any(name in sys.modules for name in WATCHED)
    if not off and not late and not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
