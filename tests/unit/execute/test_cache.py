"""What lies in the slots of a memory, and when a slot is free again."""

from __future__ import annotations

import pytest

from mergeloom.engine.execute.cache import CachedChunk, ChunkCache
from mergeloom.engine.schedule.tiling import ChunkedRead
from mergeloom.errors import BudgetError

READ = ChunkedRead(0, 16)


@pytest.fixture
def memory() -> ChunkCache:
    """Four free slots."""
    return ChunkCache("RAM", 4, 4096)


def held(memory: ChunkCache, chunk: int, *, pinned: bool = False, source: ChunkedRead = READ) -> CachedChunk:
    """A chunk that one item uses."""
    resident = memory.load(source, chunk, 100)
    resident.acquire(pinned=pinned)
    return resident


def test_a_slot_is_free_once_nobody_needs_its_chunk(memory: ChunkCache) -> None:
    resident = held(memory, 0)
    resident.acquire(pinned=False)
    memory.release(resident)
    assert memory.free_slots == 3
    memory.release(resident)
    assert memory.free_slots == 4


def test_only_what_the_schedule_keeps_is_found_again(memory: ChunkCache) -> None:
    kept, used = held(memory, 0, pinned=True), held(memory, 1)
    assert memory.find(READ, 0) is kept
    assert memory.find(READ, 1) is None  # in use, but read again, as planned
    memory.release(kept)
    assert memory.find(READ, 0) is kept
    kept.acquire(pinned=False)  # the last one that needs it
    memory.release(kept)
    assert memory.find(READ, 0) is None
    assert memory.free_slots == 3
    memory.release(used)
    assert memory.free_slots == 4


@pytest.mark.parametrize(("low", "high", "left"), [(0, 4, [0, 1, 2, 3]), (1, 3, [1, 2]), (2, 2, []), (3, 9, [3])])
def test_keeping_fewer_chunks_of_a_read_frees_the_others(
    memory: ChunkCache, low: int, high: int, left: list[int]
) -> None:
    for chunk in range(4):
        memory.release(held(memory, chunk, pinned=True))
    memory.trim(ChunkedRead(1, 16), 0, 0)  # another read
    memory.trim(ChunkedRead(0, 48), 0, 0)  # the same read in other chunks
    assert memory.free_slots == 0
    memory.trim(READ, low, high)
    assert [chunk for chunk in range(4) if memory.find(READ, chunk) is not None] == left
    assert memory.free_slots == 4 - len(left)


def test_chunks_of_two_lengths_are_different_chunks(memory: ChunkCache) -> None:
    other = ChunkedRead(READ.read, 48)
    for source in (READ, other):
        memory.release(held(memory, 0, pinned=True, source=source))
    assert memory.free_slots == 2
    memory.trim(READ, 0, 0)
    assert memory.find(READ, 0) is None
    assert memory.find(other, 0) is not None
    assert memory.free_slots == 3


def test_a_chunk_that_is_dropped_while_it_is_used_goes_with_its_last_user(memory: ChunkCache) -> None:
    resident = held(memory, 0, pinned=True)
    memory.trim(READ, 0, 0)
    assert memory.free_slots == 3
    again = held(memory, 0)  # read once more meanwhile
    memory.release(resident)
    assert memory.free_slots == 3
    memory.release(again)
    assert memory.free_slots == 4


def test_a_chunk_without_users_is_not_released(memory: ChunkCache) -> None:
    kept, used = held(memory, 2, pinned=True), held(memory, 3)
    memory.release(kept)
    with pytest.raises(ValueError, match=r"chunk 2 of read 0 \(chunk length 16\) is released without a user"):
        memory.release(kept)
    memory.release(used)
    with pytest.raises(ValueError, match=r"chunk 3 of read 0 \(chunk length 16\) is released without a user"):
        memory.release(used)
    assert (kept.users, used.users) == (0, 0)
    assert memory.free_slots == 3  # neither slot is free twice
    assert memory.find(READ, 2) is kept


def test_a_chunk_whose_slot_is_free_again_is_not_held(memory: ChunkCache) -> None:
    resident = held(memory, 0)
    memory.release(resident)
    with pytest.raises(ValueError, match=r"chunk 0 of read 0 \(chunk length 16\) is acquired after its slot was freed"):
        resident.acquire(pinned=True)
    assert memory.free_slots == 4


def test_a_chunk_that_is_kept_is_not_loaded_again(memory: ChunkCache) -> None:
    held(memory, 0, pinned=True)
    with pytest.raises(ValueError, match=r"chunk 0 of read 0 \(chunk length 16\) is loaded although it is cached"):
        memory.load(READ, 0, 100)
    assert memory.free_slots == 3


def test_only_the_slot_of_an_output_is_given_back(memory: ChunkCache) -> None:
    resident, output = held(memory, 0), memory.take()
    with pytest.raises(ValueError, match=f"slot {resident.slot} is freed, but does not hold an output chunk"):
        memory.free(resident.slot)
    memory.free(output)
    with pytest.raises(ValueError, match=f"slot {output} is freed, but does not hold an output chunk"):
        memory.free(output)
    assert memory.free_slots == 3


def test_a_cache_without_a_free_slot_says_so(memory: ChunkCache) -> None:
    for chunk in range(4):
        held(memory, chunk)
    with pytest.raises(BudgetError, match="cannot take a slot of 4096 bytes of RAM: all 4 slots are taken"):
        memory.take()
    assert memory.peak_bytes == 4 * 4096
