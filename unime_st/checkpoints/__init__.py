"""From a released or bare checkpoint to a native Sentence Transformers folder: pull, convert, verify."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unime_st.checkpoints.source import CheckpointError

if TYPE_CHECKING:
    from unime_st.checkpoints.convert import convert
    from unime_st.checkpoints.pull import pull
    from unime_st.checkpoints.verify import verify

__all__ = ["CheckpointError", "convert", "pull", "verify"]


def __getattr__(name: str) -> Any:
    if name not in ("convert", "pull", "verify"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{name}"), name)
