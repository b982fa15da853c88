"""UniME and UniME-V2 universal multimodal embeddings for sentence-transformers and mteb.

Importing this package registers its model names with sentence-transformers, its model types with transformers and its
tasks with mteb, see :func:`unime_st.register`. The classes below are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from unime_st._version import __version__
from unime_st.registry import register

if TYPE_CHECKING:
    from unime_st.data.items import Item
    from unime_st.model import UniME
    from unime_st.reranking.unime_reranker import UniMEReranker

__all__ = ["Item", "UniME", "UniMEReranker", "__version__", "register"]

_LAZY = {
    "Item": "unime_st.data.items",
    "UniME": "unime_st.model",
    "UniMEReranker": "unime_st.reranking.unime_reranker",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


register()
