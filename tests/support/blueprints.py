"""Random merge graphs as blueprints, schedules for a given number of slots, and a checked run of the executor."""

from __future__ import annotations

from hypothesis import strategies as st

from mergeloom.engine.execute.devices.base import Device
from mergeloom.engine.execute.executor import Executor
from mergeloom.engine.execute.ledger import RAM
from mergeloom.engine.execute.tasks import Measured
from mergeloom.engine.graph.graph import Kind
from mergeloom.engine.schedule.budget import Budget, DeviceBudget
from mergeloom.engine.schedule.schedule import Schedule, make_schedule
from mergeloom.errors import BudgetError
from tests.support.graphs import KERNELS, World

SLOT = 64 << 10
ELEMENTS = SLOT // 4  # of one slot, in float32
CPU = (DeviceBudget("cpu", None, 1),)


def minimum(world: World, devices: tuple[DeviceBudget, ...] = CPU) -> int:
    """The smallest RAM budget that the planner names when it refuses one of a byte."""
    try:
        make_schedule(world.graph, Budget(1, 0, devices))
    except BudgetError:
        large = make_schedule(world.graph, Budget(1 << 40, 0, devices))
        return large.minimum_ram
    raise AssertionError("a budget of one byte was accepted")


def with_slots(world: World, extra: int, devices: tuple[DeviceBudget, ...] = CPU) -> Schedule:
    """The schedule with `extra` slots more than the least."""
    budget = Budget(minimum(world, devices) + extra * SLOT, 0, devices)
    return make_schedule(world.graph, budget, slot_bytes=SLOT)


Blueprint = list[tuple[int, str, int, list[tuple[str, list[int], int]]]]
"""For each size of tensor: elements, dtype, how many sources, and nodes of a kind, on sources, with so many outputs."""


@st.composite
def blueprints(draw: st.DrawFn) -> Blueprint:
    """Graphs with shared inputs, several destinations, chains, mixed sizes, dtypes and granules."""
    found: Blueprint = []
    for _ in range(draw(st.integers(1, 4))):
        elements = draw(st.sampled_from([0, 1, 1000, ELEMENTS, ELEMENTS + 16, 3 * ELEMENTS - 5, 5 * ELEMENTS]))
        dtype = draw(st.sampled_from(["F32", "F32", "F8_E5M2"]))
        elements *= 4 if dtype == "F8_E5M2" else 1
        count = draw(st.integers(1, 5))
        nodes: list[tuple[str, list[int], int]] = []
        if draw(st.booleans()):
            kind = draw(st.sampled_from(sorted(KERNELS)))
            nodes += [(kind, [first, first + 1], 1) for first in range(count - 1)]
        for _ in range(draw(st.integers(1, 4))):
            kind = draw(st.sampled_from(["copy", *sorted(KERNELS)]))
            chosen = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=3, unique=True))
            nodes.append((kind, chosen[:1] if kind == "copy" else chosen, draw(st.integers(1, 3))))
        found.append((elements, dtype, count, nodes))
    return found


def build(blueprint: Blueprint, world: World | None = None) -> World:
    """The world that a blueprint describes."""
    world = world or World()
    for elements, dtype, count, nodes in blueprint:
        sources = [world.source(elements, dtype) for _ in range(count)]
        for kind, chosen, outputs in nodes:
            world.node(kind, [sources[index] for index in chosen], outputs)
    return world


def execute(world: World, schedule: Schedule, devices: list[Device], *, serial: bool = False) -> Measured:
    """Execute a schedule, and check what it wrote."""
    executor = Executor(world.graph, schedule, devices, world, world, serial=serial)
    measured = executor.run()
    world.check()
    assert measured.bytes_read == schedule.bytes_read == sum(nbytes for _, _, nbytes in world.reads)
    assert measured.bytes_written == schedule.bytes_written
    assert measured.ram_peak <= schedule.ram_slots * schedule.slot_bytes
    assert executor.slots.all_free
    check_ledger(executor, schedule, devices)
    if serial:
        assert measured.ram_peak == schedule.serial_ram
    return measured


def check_ledger(executor: Executor, schedule: Schedule, devices: list[Device]) -> None:
    """Check that a run reserved what the schedule counts for its buffers, and released all."""
    ledger = executor.ledger
    merges = any(operation.kind is Kind.MERGE for operation in executor.graph.operations)
    host_budget = schedule.peak_ram - schedule.budget.baseline
    assert ledger.held(RAM) == ledger.limit(RAM) == 0
    assert ledger.peak(RAM) <= schedule.buffer_ram <= host_budget
    if merges:
        assert ledger.peak(RAM) == schedule.buffer_ram
    for number, device in enumerate(devices):
        if device.separate:
            assert ledger.held(device.name) == ledger.limit(device.name) == 0
            assert ledger.peak(device.name) == (schedule.buffer_vram(number) if merges else 0)
            assert schedule.buffer_vram(number) <= schedule.peak_vram
