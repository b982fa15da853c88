"""Conversion of released or bare checkpoints to native Sentence Transformers folders: pull, convert, verify."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unime_st.checkpoints.source import CheckpointError

if TYPE_CHECKING:
    from unime_st.checkpoints.conversion import convert
    from unime_st.checkpoints.download import pull
    from unime_st.checkpoints.verification import verify

__all__ = ["CheckpointError", "convert", "pull", "verify"]


_LAZY = {"convert": "conversion", "pull": "download", "verify": "verification"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
