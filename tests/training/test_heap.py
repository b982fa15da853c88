"""Freed memory between things that stay is given back to the system."""

from __future__ import annotations

import psutil
import pytest

from unime_st.memory import malloc_trim
from unime_st.training.heap import HeapTrimmer

PIECE = 100_000  # bytes: of the heap, not a mapping of its own


def test_holes_between_what_stays_are_given_back() -> None:
    heap, process = HeapTrimmer(slack=64 << 20), psutil.Process()
    heap.begin()
    assert not heap.trim("forward")  # nothing was done yet
    assert not heap.trim("forward")  # what one mini-batch leaves behind is as much as it takes
    pieces = [bytes([1]) * PIECE for _ in range(2000)]
    kept = pieces[::10]
    del pieces
    full = process.memory_info().rss
    assert not heap.trim("forward", kept=1 << 30)  # what is kept on purpose does not count
    given_back, glibc = heap.trim("forward"), malloc_trim()
    assert given_back == glibc
    assert full - process.memory_info().rss > 100 << 20 or not glibc
    assert not heap.trim("forward")
    assert all(piece == bytes([1]) * PIECE for piece in kept)


def test_as_much_as_one_mini_batch_leaves_is_let_be() -> None:
    heap = HeapTrimmer(slack=64 << 20)
    heap.begin()
    heap.trim("forward")
    held = [bytes([1]) * PIECE for _ in range(2000)]
    assert not heap.trim("forward")
    assert not heap.trim("forward")
    more = [bytes([1]) * PIECE for _ in range(1000)]
    assert heap.trim("forward") == malloc_trim()
    assert not heap.trim("forward"), "what stays after tidying is what it takes"
    assert len(held) + len(more) == 3000


def test_each_pass_begins_on_a_tidy_heap() -> None:
    heap = HeapTrimmer()
    heap.begin()
    kinds = ["forward", "forward", "gradient", "gradient"]
    assert [heap.trim(kind) for kind in kinds] == [False, False, malloc_trim(), False]


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unime_st.memory._libc_malloc_trim", lambda: None)
    heap = HeapTrimmer(slack=0)
    heap.begin()
    assert not any(heap.trim(kind) for kind in ("forward", "forward", "gradient"))
