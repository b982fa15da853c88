"""Hard-negative selection under its public name, see :mod:`unime_st.judging.select`."""

from __future__ import annotations

from unime_st.judging.select import select_negatives

__all__ = ["select_negatives"]
