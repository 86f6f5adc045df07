"""Slots are withheld when the process's memory runs short, but never those that the steps need: no merge hangs."""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeloom.engine.cost.machine import process_memory, resident_memory
from mergeloom.engine.execute.arena import MARGIN_BYTES, HostArena, MemoryWatch, Slots
from mergeloom.engine.execute.devices.cpu import CpuDevice
from mergeloom.engine.execute.executor import Executor
from mergeloom.engine.schedule.budget import Budget
from mergeloom.engine.schedule.schedule import Schedule, make_schedule
from tests.examples import examples
from tests.support.blueprints import CPU, ELEMENTS, SLOT, Blueprint, blueprints, build, with_slots
from tests.support.graphs import World
from tests.support.waiting import no_hang, wait_until

LIMIT = 64 << 20


def watch(resident: Callable[[], int]) -> MemoryWatch:
    """A watch that measures each time it is asked."""
    return MemoryWatch(LIMIT, resident, interval=0)


def slots(now: list[int], *, count: int = 8, minimum: int = 3, discarded: list[int] | None = None) -> Slots:
    """Slots of a process whose resident memory is `now[0]` bytes."""
    discard = None if discarded is None else discarded.append
    return Slots("RAM", count, SLOT, minimum=minimum, watch=watch(lambda: now[0]), discard=discard)


def test_without_pressure_every_slot_is_used_in_turn() -> None:
    found = slots([0])
    for number in range(8):
        assert found.has_free(1)
        slot = found.take()
        assert slot == number
        found.free(slot)
    assert found.take() == 0
    assert found.has_free(7)
    assert not found.has_free(8)


def test_fresh_slots_are_withheld_under_pressure() -> None:
    now = [0]
    found = slots(now)
    taken = [found.take() for _ in range(4)]
    now[0] = LIMIT
    assert not found.has_free(1)
    assert found.free_slots == 4
    found.free(taken.pop())
    assert found.has_free(1)
    assert not found.has_free(2)
    assert found.take() == 3  # its pages are resident already
    now[0] = LIMIT - MARGIN_BYTES - 2 * SLOT
    assert found.has_free(2)
    assert not found.has_free(3)


def test_the_minimum_is_always_granted() -> None:
    found = slots([10 * LIMIT], discarded=[])
    for _ in range(20):
        assert found.has_free(3)
        assert not found.has_free(4)
        taken = [found.take() for _ in range(3)]
        assert not found.has_free(1)
        for slot in taken:
            found.free(slot)


def test_slots_beyond_the_minimum_return_their_pages() -> None:
    now, discarded = [0], list[int]()
    found = slots(now, discarded=discarded)
    taken = [found.take() for _ in range(8)]
    now[0] = LIMIT
    for slot in taken:
        found.free(slot)
    assert discarded == taken[:5]  # three stay
    assert found.has_free(3)
    assert not found.has_free(4)
    now[0] = 0
    assert found.has_free(8)
    assert sorted(found.take() for _ in range(8)) == list(range(8))


def test_bytes_that_are_granted_count_before_they_are_resident() -> None:
    times = [0]

    def resident() -> int:
        times[0] += 1
        return LIMIT - MARGIN_BYTES - 3 * SLOT

    found = MemoryWatch(LIMIT, resident, interval=3600)
    for _ in range(3):
        assert found.has_room(SLOT)
        found.grant(SLOT)
    assert not found.has_room(SLOT)
    assert found.has_room(0)
    assert times == [1]
    assert MemoryWatch().has_room(1 << 60)


class WaitingWorld(World):
    """Sources whose first read waits until a number of bytes is held in slots."""

    executor: Executor
    wanted = 0

    def read(self, file: Path, offset: int, buffer: memoryview) -> None:
        """Fill a buffer."""
        wait_until(lambda: self.executor.slots.ram.peak_bytes >= self.wanted)
        super().read(file, offset, buffer)


def run(world: World, schedule: Schedule, resident: Callable[[], int]) -> Executor:
    """Execute a schedule in a process with this resident memory; the bytes are right, and nothing waits forever."""
    executor = Executor(world.graph, schedule, [CpuDevice(1)], world, world, resident=resident)
    executor.slots.ram._slots._watch._interval = 0
    if isinstance(world, WaitingWorld):
        world.executor = executor
    with no_hang():
        executor.run()
    world.check()
    assert executor.slots.all_free
    return executor


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(blueprints(), st.sampled_from([0, 1, 3, 20]))
def test_any_merge_finishes_in_a_process_that_is_too_large(blueprint: Blueprint, extra: int) -> None:
    world = build(blueprint)
    schedule = with_slots(world, extra)
    executor = run(world, schedule, lambda: 1 << 50)
    assert executor.measured.ram_peak <= schedule.serial_ram
    assert executor.measured.bytes_read == schedule.bytes_read


@settings(max_examples=examples(30), deadline=None, suppress_health_check=list(HealthCheck))
@given(blueprints(), st.integers())
def test_any_merge_finishes_while_memory_comes_and_goes(blueprint: Blueprint, seed: int) -> None:
    chance = random.Random(seed)
    world = build(blueprint)
    schedule = with_slots(world, 20)
    executor = run(world, schedule, lambda: chance.choice([0, 0, schedule.budget.ram, 1 << 50]))
    assert executor.measured.bytes_read == schedule.bytes_read


def test_less_is_read_ahead_under_pressure() -> None:
    def peak(resident: int, wanted: int) -> int:
        world = WaitingWorld()
        world.wanted = wanted
        world.node("sum", [world.source(40 * ELEMENTS)])
        schedule = make_schedule(world.graph, Budget(1 << 40, 0, CPU), slot_bytes=SLOT)
        return run(world, schedule, lambda: resident).measured.ram_peak

    assert peak(1 << 50, 2 * SLOT) == 2 * SLOT  # one source, one output
    assert peak(0, 6 * SLOT) >= 6 * SLOT


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="madvise is missing")
def test_a_discarded_slot_takes_no_memory() -> None:
    nbytes = 8 << 20
    arena = HostArena(4, nbytes)
    for slot in range(4):
        arena.view(slot, nbytes)[:] = b"\x01" * nbytes
    before = resident_memory()
    arena.discard(2)
    assert resident_memory() <= before - nbytes // 2
    assert bytes(arena.view(2, 4096)) == bytes(4096)
    assert bytes(arena.view(1, 4096)) == bytes(arena.view(3, 4096)) == b"\x01" * 4096
    arena.close()


def test_resident_memory_is_that_of_the_process() -> None:
    assert Path("/proc/self/statm").exists()
    assert abs(resident_memory() - process_memory().now) < 8 << 20
