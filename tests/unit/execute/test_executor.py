"""The executor over small graphs in memory: the right bytes, each written once, within the schedule's bounds."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mergeloom.engine.execute.compute.runner import KernelRunner
from mergeloom.engine.execute.devices.base import Device, OutOfDeviceMemory
from mergeloom.engine.execute.devices.cpu import CpuDevice
from mergeloom.engine.execute.executor import Executor
from mergeloom.engine.execute.replan import SPARE, run_graph
from mergeloom.engine.execute.tasks import ChunkTask
from mergeloom.engine.schedule.budget import Budget, DeviceBudget
from mergeloom.engine.schedule.schedule import make_schedule
from mergeloom.engine.schedule.step_list import CachedRange
from mergeloom.engine.schedule.tiling import ChunkedRead
from mergeloom.methods.kernel.fused.compiled import Compiled
from mergeloom.methods.kernel.kernel import Kernel
from tests.examples import examples
from tests.support.blueprints import ELEMENTS, SLOT, Blueprint, blueprints, build, execute, with_slots
from tests.support.devices import CountingDevice
from tests.support.graphs import KERNELS, World
from tests.support.waiting import HANG_SECONDS


@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(blueprints(), st.sampled_from([0, 1, 3, 20]), st.booleans())
def test_cpu_keeps_what_the_schedule_promises(blueprint: Blueprint, extra: int, serial: bool) -> None:
    world = build(blueprint)
    execute(world, with_slots(world, extra), [CpuDevice(1)], serial=serial)


@st.composite
def crowded(draw: st.DrawFn) -> Blueprint:
    """Many nodes on few sources, in chunks of two lengths."""
    elements = draw(st.sampled_from([4, 6, 8])) * 9999
    chosen = st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True)
    nodes = draw(st.lists(st.tuples(st.sampled_from(sorted(KERNELS)), chosen, st.just(1)), min_size=3, max_size=6))
    return [(elements, "F32", 4, nodes)]


FIVE_CHUNKS = [
    ("sum", [3, 1], 1),
    ("sum 9999", [2, 3], 1),
    ("above 9999", [1, 3, 0], 1),
    ("sum", [2, 3, 0], 1),
    ("sum 9999", [0], 1),
    ("sum 9999", [0, 1], 1),
]
SIX_CHUNKS = [
    ("sum", [1], 1),
    ("sum 9999", [1], 1),
    ("above 9999", [3, 1, 2], 1),
    ("sum", [3, 2], 1),
    ("sum", [3], 1),
    ("sum", [1, 3], 1),
]


# in the first two, a step drops chunks of one length of a read, and a later one needs those of the other length
@example([(6 * 9999, "F32", 4, FIVE_CHUNKS)], 8, True)
@example([(8 * 9999, "F32", 4, SIX_CHUNKS)], 10, True)
@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(crowded(), st.sampled_from([2, 4, 6, 8, 10, 14, 18]), st.booleans())
def test_chunks_of_two_lengths_are_read_as_planned(blueprint: Blueprint, extra: int, serial: bool) -> None:
    world = build(blueprint)
    execute(world, with_slots(world, extra), [CpuDevice(1)], serial=serial)


def test_a_copy_drops_what_it_cannot_use_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    #  a(3 chunks) ┬─ sum ── out0     F8 on a device: a stays there for out2, but the copy goes through RAM, in chunks
    #              ├─ copy ─ out1     of the same length: it reads a again and keeps it in RAM, where out2 finds it
    #              └─ sum ── out2
    world = World()
    a = world.source(3 * SLOT, "F8_E5M2")
    for kind in ("sum", "copy", "sum"):
        world.node(kind, [a])
    monkeypatch.setattr("mergeloom.engine.schedule.candidate.orders", lambda graph: [list(graph)])
    budget = DeviceBudget("test", 64 << 20, 1)
    schedule = make_schedule(world.graph, Budget(64 << 20, 0, (budget,)), slot_bytes=SLOT)
    assert [step.keep for step in schedule.steps] == [(CachedRange(vram=3),), (CachedRange(0, 0, 3),), (CachedRange(),)]
    assert [step.drop for step in schedule.steps] == [(), ((ChunkedRead(a, SLOT), CachedRange()),), ()]
    assert [step.bytes_read for step in schedule.steps] == [(3 * SLOT,), (3 * SLOT,), (0,)]
    device = CountingDevice("test", 64 << 20)
    execute(world, schedule, [device])
    assert device.uploaded == schedule.uploaded == 6 * SLOT


@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(blueprints(), st.sampled_from([0, 1, 3, 20]), st.sampled_from([0, 1, 3, 20]), st.integers(1, 2), st.booleans())
def test_devices_keep_what_the_schedule_promises(
    blueprint: Blueprint, ram: int, vram: int, count: int, serial: bool
) -> None:
    world = build(blueprint)
    large = tuple(DeviceBudget(f"test:{n}", 1 << 40, 2) for n in range(count))
    least = make_schedule(world.graph, Budget(1 << 40, 0, large), slot_bytes=SLOT)
    budgets = tuple(DeviceBudget(f"test:{n}", least.minimum_vram + vram * SLOT, 2) for n in range(count))
    schedule = make_schedule(world.graph, Budget(least.minimum_ram + ram * SLOT, 0, budgets), slot_bytes=SLOT)
    devices = [CountingDevice(budget.name, budget.vram or 0, 2) for budget in budgets]
    measured = execute(world, schedule, list(devices), serial=serial)
    assert sum(device.uploaded for device in devices) == schedule.uploaded
    assert measured.vram_peak <= schedule.peak_vram


def test_two_devices_share_the_work() -> None:
    world = World()
    for _ in range(8):
        world.node("sum", [world.source(2 * ELEMENTS), world.source(2 * ELEMENTS)])
    budgets = tuple(DeviceBudget(f"test:{n}", 64 << 20, 1) for n in range(2))
    schedule = make_schedule(world.graph, Budget(64 << 20, 0, budgets), slot_bytes=SLOT)
    devices = [CountingDevice(budget.name, 64 << 20) for budget in budgets]
    execute(world, schedule, list(devices))
    assert devices[0].uploaded == devices[1].uploaded > 0


@pytest.mark.parametrize("separate", [False, True])
def test_reading_computing_and_writing_overlap(separate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk is written while another one is computed and a third one is read: each waits for the other two."""
    at_once = threading.Barrier(3)
    calls: Counter[str] = Counter()

    def meet(lane: str, call: int) -> None:
        calls[lane] += 1
        if calls[lane] == call:
            at_once.wait(HANG_SECONDS)  # breaks, and ends the run with an error, if the lanes take turns

    class Meeting(World):
        def read(self, file: Path, offset: int, buffer: memoryview) -> None:
            super().read(file, offset, buffer)
            meet("read", 6)

        def write(self, node: int, offset: int, data: memoryview) -> None:
            super().write(node, offset, data)
            meet("write", 2)

    combine = KernelRunner.combine

    def meeting(self: KernelRunner, thread: int, task: ChunkTask, state: Any) -> int:
        meet("compute", 4)
        return combine(self, thread, task, state)

    monkeypatch.setattr(KernelRunner, "combine", meeting)
    world = Meeting()
    world.node("sum", [world.source(12 * ELEMENTS)])
    device = DeviceBudget("test", 64 << 20 if separate else None, 1)
    schedule = make_schedule(world.graph, Budget(64 << 20, 0, (device,)), slot_bytes=SLOT)
    executor_device = CountingDevice("test", 64 << 20) if separate else CpuDevice(1)
    Executor(world.graph, schedule, [executor_device], world, world, readers=1).run()
    world.check()
    assert calls == {"read": 12, "compute": 12, "write": 12}
    assert not at_once.broken


@pytest.mark.parametrize("kind", ["sum", "above", "copy"])
def test_a_started_node_is_resumed(kind: str) -> None:
    complete, rest = World(), World()
    for world in (complete, rest):
        world.node(kind, [world.source(6 * ELEMENTS)])
        world.node("sum", [world.source(2 * ELEMENTS)])
        world.node("sum", [world.source(ELEMENTS)])
    execute(complete, with_slots(complete, 3), [CpuDevice(1)])
    written = 2 * SLOT + 100  # two complete chunks of them need not be written again
    budget = with_slots(rest, 3).budget
    schedule = make_schedule(rest.graph, budget, slot_bytes=SLOT, done={0: written, 1: 2 * SLOT})
    rest.written[0] = bytearray(complete.written[0][:written] + bytes(6 * SLOT - written))
    measured = Executor(rest.graph, schedule, [CpuDevice(1)], rest, rest).run()
    assert rest.written[0] == complete.written[0]
    assert 1 not in rest.written
    assert rest.written[2] == complete.written[2]
    assert measured.bytes_written == schedule.bytes_written == 4 * SLOT + SLOT
    passes = {"sum": 0, "copy": 0, "above": 2}[kind]
    assert measured.bytes_read == schedule.bytes_read == 4 * SLOT + passes * 6 * SLOT + SLOT


def test_another_process_on_the_device_leads_to_a_smaller_schedule() -> None:
    world = World()
    world.node("above", [world.source(40 * ELEMENTS)])
    budgets = (DeviceBudget("test", 64 << 20, 1),)
    schedule = make_schedule(world.graph, Budget(64 << 20, 0, budgets))
    free = schedule.minimum_vram * 2
    assert free < schedule.peak_vram
    made: list[CountingDevice] = []

    def open_devices(wanted: Sequence[DeviceBudget]) -> list[Device]:
        made.append(CountingDevice("test", free))
        return [made[-1]]

    measured = run_graph(world.graph, schedule, open_devices, world, world)
    world.check()
    assert measured.reduced_vram == {"test": int(free * SPARE)}
    assert [device.held <= free for device in made] == [False, True]

    with pytest.raises(OutOfDeviceMemory, match="another process holds the rest"):
        run_graph(world.graph, schedule, lambda wanted: [CountingDevice("test", 1000)], world, world)


def test_memory_freed_by_another_process_does_not_raise_the_budget() -> None:
    """The device has more free than was allowed, and had too little a moment ago."""
    world = World()
    world.node("above", [world.source(40 * ELEMENTS)])
    schedule = make_schedule(world.graph, Budget(64 << 20, 0, (DeviceBudget("test", 64 << 20, 1),)))
    wanted: list[int] = []

    class Crowded(CountingDevice):
        """Others hold memory while the first one opens."""

        def open(self, slots: int, slot_bytes: int, workspace: int, host: Any) -> None:
            if len(wanted) == 1:
                raise OutOfDeviceMemory(self.name, slots * slot_bytes, 1 << 40)
            super().open(slots, slot_bytes, workspace, host)

    def open_devices(budgets: Sequence[DeviceBudget]) -> list[Device]:
        wanted.append(budgets[0].vram or 0)
        return [Crowded("test", wanted[-1])]

    measured = run_graph(world.graph, schedule, open_devices, world, world)
    world.check()
    assert wanted == [64 << 20, int((64 << 20) * SPARE)]
    assert measured.vram_peak <= wanted[-1]


def test_kernels_are_compiled_in_the_order_of_the_plan_while_chunks_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: dict[Compiled, str] = {}
    inputs: dict[Compiled, int] = {}
    all_compiled = threading.Event()
    make, prepare = Compiled.__init__, Compiled.prepare

    def count(loops: Compiled, kernel: Kernel, dtypes: Sequence[str], out: str) -> None:
        inputs[loops] = len(dtypes)
        make(loops, kernel, dtypes, out)

    def note(loops: Compiled) -> None:
        prepare(loops)
        compiled.setdefault(loops, threading.current_thread().name)
        if len(compiled) == 3:
            all_compiled.set()

    class Late(World):
        def read(self, file: Path, offset: int, buffer: memoryview) -> None:
            assert all_compiled.wait(60)
            super().read(file, offset, buffer)

    world = Late()
    for number in (2, 3, 1):
        world.node("sum", [world.source(ELEMENTS) for _ in range(number)])
    monkeypatch.setattr(Compiled, "__init__", count)
    monkeypatch.setattr(Compiled, "prepare", note)
    schedule = with_slots(world, 2)
    Executor(world.graph, schedule, [CpuDevice(1)], world, world).run()
    world.check()
    order = [len(world.graph.node_sources[step.node]) for step in schedule.steps]
    assert [(inputs[loops], thread) for loops, thread in compiled.items()] == [(each, "compile-0") for each in order]
