"""What lies in the slots of a memory, and when a slot is free again."""

from __future__ import annotations

import pytest

from mergeloom.engine.arena import Ledger
from mergeloom.engine.residency import Key, Memory, Resident


@pytest.fixture
def memory() -> Memory:
    """Four free slots."""
    return Memory(Ledger(), "ram", 4, 4096)


def held(memory: Memory, key: Key, *, pinned: bool = False) -> Resident:
    """A chunk that one item uses."""
    resident = memory.load(key, 100)
    resident.hold(pinned=pinned)
    return resident


def test_a_slot_is_free_once_nobody_needs_its_chunk(memory: Memory) -> None:
    resident = held(memory, (0, 16, 0))
    resident.hold(pinned=False)
    memory.release(resident)
    assert memory.free == 3
    memory.release(resident)
    assert memory.free == 4


def test_only_what_the_schedule_keeps_is_found_again(memory: Memory) -> None:
    kept, used = held(memory, (0, 16, 0), pinned=True), held(memory, (0, 16, 1))
    assert memory.find(kept.key) is kept
    assert memory.find(used.key) is None  # in use, but read again, as was foretold
    memory.release(kept)
    assert memory.find(kept.key) is kept
    kept.hold(pinned=False)  # the last one that needs it
    memory.release(kept)
    assert memory.find(kept.key) is None
    assert memory.free == 3


@pytest.mark.parametrize(("low", "high", "left"), [(0, 4, [0, 1, 2, 3]), (1, 3, [1, 2]), (2, 2, []), (3, 9, [3])])
def test_keeping_fewer_chunks_of_a_read_frees_the_others(memory: Memory, low: int, high: int, left: list[int]) -> None:
    keys = [(0, 16, chunk) for chunk in range(4)]
    for key in keys:
        memory.release(held(memory, key, pinned=True))
    memory.keep_only(1, 0, 0)  # another read
    assert memory.free == 0
    memory.keep_only(0, low, high)
    assert [key[2] for key in keys if memory.find(key) is not None] == left
    assert memory.free == 4 - len(left)


def test_a_chunk_that_is_dropped_while_it_is_used_goes_with_its_last_user(memory: Memory) -> None:
    resident = held(memory, (0, 16, 0), pinned=True)
    memory.keep_only(0, 0, 0)
    assert memory.free == 3
    again = held(memory, (0, 16, 0))  # read once more meanwhile
    memory.release(resident)
    assert memory.free == 3
    memory.release(again)
    assert memory.free == 4
