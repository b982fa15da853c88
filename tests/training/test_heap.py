"""Freed memory between things that stay is given back to the system."""

from __future__ import annotations

import psutil
import pytest

from unime_st.training.heap import Heap, _malloc_trim

PIECE = 100_000  # bytes: of the heap, not a mapping of its own


def test_holes_between_what_stays_are_given_back() -> None:
    heap, process = Heap(slack=64 << 20), psutil.Process()
    heap.begin()
    assert not heap.tidy("forward")  # nothing was done yet
    assert not heap.tidy("forward")  # what is kept after the first mini-batch is as much as it takes
    pieces = [bytes([1]) * PIECE for _ in range(2000)]
    kept = pieces[::10]
    del pieces
    full = process.memory_info().rss
    assert not heap.tidy("forward", kept=1 << 30)  # what is kept on purpose does not count
    glibc = _malloc_trim() is not None
    assert heap.tidy("gradient") == glibc
    assert full - process.memory_info().rss > 100 << 20 or not glibc
    assert not (glibc and heap.tidy("gradient"))
    assert all(piece == bytes([1]) * PIECE for piece in kept)


def test_as_much_as_the_first_mini_batch_took_is_let_be() -> None:
    heap = Heap(slack=64 << 20)
    heap.begin()
    heap.tidy("forward")
    held = [bytes([1]) * PIECE for _ in range(2000)]
    assert not heap.tidy("gradient")
    assert not heap.tidy("gradient")
    more = [bytes([1]) * PIECE for _ in range(1000)]
    assert heap.tidy("gradient") == (_malloc_trim() is not None)
    assert len(held) + len(more) == 3000


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unime_st.training.heap._malloc_trim", lambda: None)
    heap = Heap(slack=0)
    heap.begin()
    assert not any(heap.tidy("forward") for _ in range(3))
