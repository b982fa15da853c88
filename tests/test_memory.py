"""Resident memory: malloc_trim returns freed memory, and HeapTrimmer calls it where memory grows, not elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from unime_st import memory
from unime_st.memory import HeapTrimmer, malloc_trim, peak_resident, resident

MIB = 1 << 20


def test_malloc_trim_returns_holes_between_allocations_that_stay() -> None:
    piece = 100_000  # small enough for the heap, where a larger block would be a mapping of its own
    pieces = [bytes([1]) * piece for _ in range(2000)]
    kept = pieces[::10]
    del pieces
    full = resident()
    trimmed = malloc_trim()
    # 180 MB were freed. A quarter is far above what the rest of the process may allocate meanwhile.
    assert full - resident() > 45 * MIB or not trimmed
    assert all(part == bytes([1]) * piece for part in kept)
    assert peak_resident() >= resident()


class Process:
    """A process whose resident memory is set by the test; trimming returns all that is not in use."""

    def __init__(self, glibc: bool = True) -> None:
        self.resident, self.in_use, self.glibc = 500 * MIB, 500 * MIB, glibc

    def malloc_trim(self) -> bool:
        self.resident = self.in_use if self.glibc else self.resident
        return self.glibc

    def run_mini_batch(self, holes: int, stays: int = 0) -> None:
        self.in_use += stays * MIB
        self.resident += (holes + stays) * MIB


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Process]:
    def make(glibc: bool = True) -> Process:
        process = Process(glibc)
        monkeypatch.setattr(memory, "resident", lambda: process.resident)
        monkeypatch.setattr(memory, "malloc_trim", process.malloc_trim)
        return process

    return make


def test_growth_beyond_one_mini_batch_is_trimmed(process: Callable[..., Process]) -> None:
    here, trimmer = process(), HeapTrimmer(slack=64 * MIB)
    trimmer.begin()
    assert not trimmer.trim("forward")  # nothing was done yet
    here.run_mini_batch(holes=10)
    assert not trimmer.trim("forward")  # what one mini-batch leaves behind on a trimmed heap is usual
    here.run_mini_batch(holes=180)
    assert not trimmer.trim("forward", kept=1 << 30)  # memory kept on purpose does not count
    assert trimmer.trim("forward")
    assert here.resident == here.in_use
    assert not trimmer.trim("forward")


def test_what_a_mini_batch_leaves_behind_is_not_trimmed(process: Callable[..., Process]) -> None:
    here, trimmer = process(), HeapTrimmer(slack=64 * MIB)
    trimmer.begin()
    trimmer.trim("forward")
    here.run_mini_batch(holes=0, stays=200)
    assert not trimmer.trim("forward")
    assert not trimmer.trim("forward")
    here.run_mini_batch(holes=0, stays=100)
    assert trimmer.trim("forward")
    assert not trimmer.trim("forward"), "what stays after trimming is in use"


def test_each_pass_begins_on_a_trimmed_heap(process: Callable[..., Process]) -> None:
    process()
    trimmer = HeapTrimmer()
    trimmer.begin()
    kinds = ["forward", "forward", "gradient", "gradient"]
    assert [trimmer.trim(kind) for kind in kinds] == [False, False, True, False]


def test_other_c_libraries_are_left_alone(process: Callable[..., Process]) -> None:
    here, trimmer = process(glibc=False), HeapTrimmer(slack=0)
    trimmer.begin()
    here.run_mini_batch(holes=100)
    assert not any(trimmer.trim(kind) for kind in ("forward", "forward", "gradient"))


def test_malloc_trim_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unime_st.memory._libc_malloc_trim", lambda: None)
    assert malloc_trim() is False
