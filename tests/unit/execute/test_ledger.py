"""The ledger: buffers are reserved within the plan's figures, and one byte more is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mergeloom.engine.execute.devices.base import Device
from mergeloom.engine.execute.devices.cpu import CpuDevice
from mergeloom.engine.execute.executor import Executor
from mergeloom.engine.execute.ledger import RAM, Ledger
from mergeloom.engine.schedule.budget import Budget, DeviceBudget
from mergeloom.engine.schedule.candidate import PARTIAL_BYTES
from mergeloom.engine.schedule.schedule import Schedule, make_schedule
from mergeloom.errors import BudgetError
from tests.support.blueprints import ELEMENTS, SLOT, execute
from tests.support.devices import CountingDevice
from tests.support.graphs import World


def test_the_limit_is_exact_and_the_refusal_says_what_is_held() -> None:
    ledger = Ledger()
    with ledger.allow(100), ledger.reserve("arena", 60):
        with ledger.reserve("copy buffers", 40):
            assert ledger.held() == ledger.limit() == 100
        with pytest.raises(BudgetError, match="cannot reserve 41 bytes of RAM for copy buffers") as error:
            ledger.reserve("copy buffers", 41)
        assert "60 of 100 bytes are reserved (arena 60B)" in str(error.value)
        assert ledger.held() == 60
    assert ledger.held() == ledger.limit() == 0
    assert ledger.peak() == 100


def test_nothing_is_reserved_without_a_figure_of_the_plan() -> None:
    with pytest.raises(BudgetError, match=r"0 of 0 bytes are reserved \(nothing\)"):
        Ledger().reserve("arena", 1)


def test_empty_reservations_of_one_name_are_released_one_by_one() -> None:
    ledger = Ledger()
    with ledger.reserve("workspaces", 0), ledger.reserve("workspaces", 0):
        assert ledger.held() == 0
    assert ledger.held() == 0


def test_each_memory_has_its_own_limit() -> None:
    ledger = Ledger()
    with ledger.allow(100), ledger.allow(10, "cuda:0"):
        ledger.reserve("arena", 10, "cuda:0")
        with pytest.raises(BudgetError, match="of cuda:0 for workspaces"):
            ledger.reserve("workspaces", 1, "cuda:0")
        assert (ledger.held(RAM), ledger.held("cuda:0")) == (0, 10)


def test_figures_add_up_and_are_withdrawn() -> None:
    ledger = Ledger()
    with ledger.allow(100):
        with ledger.allow(50):
            ledger.reserve("copy buffers", 150).release()
        with pytest.raises(BudgetError):
            ledger.reserve("copy buffers", 101)


def test_a_reservation_is_released_once_and_by_an_error_too() -> None:
    ledger = Ledger()
    with ledger.allow(100):
        reservation = ledger.reserve("arena", 100)
        reservation.release()
        with pytest.raises(ValueError, match="'arena' of 100 bytes of RAM is released twice"):
            reservation.release()
        with pytest.raises(OSError, match="disk"), ledger.reserve("arena", 100):
            raise OSError("disk")
        assert ledger.held() == 0


def small(separate: bool) -> tuple[World, Schedule, list[Device]]:
    """A graph with a reduction, its schedule, and its device."""
    world = World()
    world.node("above", [world.source(6 * ELEMENTS)])
    device = DeviceBudget("test", 64 << 20 if separate else None, 2)
    schedule = make_schedule(world.graph, Budget(64 << 20, 0, (device,)), slot_bytes=SLOT)
    return world, schedule, [CountingDevice("test", 64 << 20, 2) if separate else CpuDevice(2)]


@pytest.mark.parametrize("separate", [False, True])
def test_a_run_reserves_the_figures_of_the_plan(separate: bool) -> None:
    world, schedule, devices = small(separate)
    execute(world, schedule, devices)  # compares the ledger with the schedule
    arena, workspaces = schedule.ram_slots * SLOT, 2 * schedule.workspace[0]
    assert schedule.buffer_ram == arena + (0 if separate else workspaces + 2 * PARTIAL_BYTES)
    assert schedule.buffer_vram(0) == (schedule.vram_slots[0] * SLOT if separate else 0) + workspaces


@pytest.mark.parametrize("separate", [False, True])
def test_a_buffer_larger_than_planned_is_refused_before_it_is_allocated(
    separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The schedule's figures stay as they are, and the arena has one slot more."""
    world, schedule, devices = small(separate)
    ram, vram = schedule.buffer_ram, schedule.buffer_vram(0)
    monkeypatch.setattr(Schedule, "buffer_ram", ram)
    monkeypatch.setattr(Schedule, "buffer_vram", lambda schedule, device: vram)
    if separate:
        larger = replace(schedule, vram_slots=(schedule.vram_slots[0] + 1,))
    else:
        larger = replace(schedule, ram_slots=schedule.ram_slots + 1)
    executor = Executor(world.graph, larger, devices, world, world)
    with pytest.raises(BudgetError, match="this is a bug in mergeloom"):
        executor.run()
    assert not world.reads
    assert executor.ledger.held() == executor.ledger.held("test") == 0


def test_an_executor_runs_once() -> None:
    world, schedule, devices = small(False)
    executor = Executor(world.graph, schedule, devices, world, world)
    executor.run()
    with pytest.raises(RuntimeError, match="this Executor has run already"):
        executor.run()
