"""The executor when something fails: the first error is raised, no thread is left, and all memory is released."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.execute import memory
from mergeloom.engine.execute.arena import HostArena, take_memory
from mergeloom.engine.execute.compute.runner import KernelRunner
from mergeloom.engine.execute.devices.base import Device, OutOfDeviceMemory
from mergeloom.engine.execute.devices.cpu import CpuDevice
from mergeloom.engine.execute.executor import Executor
from mergeloom.engine.execute.ledger import RAM
from mergeloom.engine.graph.footprint import Footprint, Line
from mergeloom.engine.graph.graph import Kind, Operation
from mergeloom.engine.schedule.budget import Budget, DeviceBudget
from mergeloom.engine.schedule.schedule import make_schedule
from mergeloom.errors import CheckpointError, EnvironmentFailure, UsageError
from mergeloom.io.tensors.dtypes import F32
from mergeloom.methods import host
from mergeloom.methods.kernel.fused.compiled import Compiled
from mergeloom.methods.kernel.kernel import Kernel
from tests.support.blueprints import ELEMENTS, SLOT, with_slots
from tests.support.devices import CountingDevice, FailureOnPurpose
from tests.support.graphs import World
from tests.support.methods.kernels import kernel_of
from tests.support.waiting import no_hang


def failing(function: Callable[..., Any], call: int, *, late: bool = False) -> Callable[..., Any]:
    """The function, but call number `call`, from 1, fails; if `late`, it returns a marker that fails."""
    lock, calls = threading.Lock(), 0

    class LateFailure:
        """A marker that the device never reaches."""

        def wait(self) -> None:
            """Fail."""
            raise FailureOnPurpose(f"after call {call}")

    def called(*arguments: Any) -> Any:
        nonlocal calls
        with lock:
            calls += 1
            fails = calls == call
        if fails and not late:
            raise FailureOnPurpose(f"call {call}")
        result = function(*arguments)
        return LateFailure() if fails else result

    return called


ANYWHERE = [
    (World, "read", False),
    (KernelRunner, "reduce", False),
    (Kernel, "merge", False),
    (KernelRunner, "combine", False),
    (KernelRunner, "compare", False),
    (World, "write", False),
    (World, "finished", False),
]
ON_DEVICES = [
    (CountingDevice, "upload", False),
    (CountingDevice, "uploads_begun", True),
    (CountingDevice, "download", False),
    (CountingDevice, "download", True),
]
FAILURES = [(0, *each) for each in ANYWHERE] + [(n, *each) for n in (1, 2) for each in ANYWHERE + ON_DEVICES]
"""Number of devices with their own memory, and the function that fails: one in each lane at least."""


@pytest.mark.parametrize(
    ("count", "owner", "name", "late"),
    FAILURES,
    ids=[f"{name}{' late' * late}-{count}" for count, _, name, late in FAILURES],
)
@pytest.mark.parametrize("call", [1, 3])
def test_an_error_in_a_lane_ends_the_run_and_releases_everything(
    count: int, owner: type, name: str, late: bool, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    for kind in ("above", "sum", "copy", "equal"):
        world.node(kind, [world.source(4 * ELEMENTS, seed=0) for _ in range(1 + (kind == "equal"))])
    budgets = tuple(DeviceBudget(f"test:{n}", 64 << 20, 1) for n in range(count)) or (DeviceBudget("cpu", None, 2),)
    schedule = make_schedule(world.graph, Budget(64 << 20, 0, budgets), slot_bytes=SLOT)
    schedule = make_schedule(world.graph, Budget(schedule.minimum_ram + SLOT, 0, budgets), slot_bytes=SLOT)
    devices: list[Device] = [CountingDevice(each.name, 64 << 20) for each in budgets] if count else [CpuDevice(2)]
    arenas: list[HostArena] = []
    closed: list[CountingDevice] = []

    def open_arena(slots: int, slot_bytes: int) -> HostArena:
        arenas.append(HostArena(slots, slot_bytes))
        return arenas[-1]

    monkeypatch.setattr(memory, "HostArena", open_arena)
    monkeypatch.setattr(CountingDevice, "close", lambda device: closed.append(device))
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), call, late=late))
    before = threading.active_count()
    executor = Executor(world.graph, schedule, devices, world, world)
    with no_hang(), pytest.raises(FailureOnPurpose, match=f"call {call}$") as failed:
        executor.run()
    assert threading.active_count() == before
    assert len(closed) == count
    for each in (RAM, *(budget.name for budget in budgets[:count])):
        assert executor.ledger.peak(each) > 0
        assert executor.ledger.held(each) == executor.ledger.limit(each) == 0
    (arena,) = arenas  # the traceback may hold views of the arena, but then its pages are released
    assert arena._map.closed or not arena._map[:].strip(b"\0"), failed.traceback


def test_an_error_of_the_progress_display_ends_the_run() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    world = World()
    world.node("sum", [world.source(4 * ELEMENTS)])
    before = threading.active_count()
    executor = Executor(world.graph, with_slots(world, 2), [CpuDevice(1)], world, world)
    with no_hang(), pytest.raises(KeyboardInterrupt):
        executor.run(stop)
    assert threading.active_count() == before
    assert executor.ledger.held(RAM) == executor.ledger.limit(RAM) == 0


def test_nonfinite_inputs_are_refused_by_name() -> None:
    world = World()
    world.node("sum", [world.source(ELEMENTS)])
    file, data = next(iter(world.files.items()))
    world.files[file] = data[:400] + b"\x00\x00\xc0\x7f" + data[404:]
    with pytest.raises(CheckpointError, match="tensor t0 of m holds NaN"):
        Executor(world.graph, with_slots(world, 2), [CpuDevice(1)], world, world).run()


def test_opened_devices_are_closed_after_every_error() -> None:
    world = World()
    world.node("above", [world.source(4 * ELEMENTS)])
    budgets = tuple(DeviceBudget(f"test:{number}", 64 << 20, 1) for number in range(2))
    schedule = make_schedule(world.graph, Budget(64 << 20, 0, budgets))
    events: list[str] = []

    class Recording(CountingDevice):
        """A device that records its calls, and fails when it is closed."""

        def open(self, slots: int, slot_bytes: int, workspace: int, host: Any) -> None:
            events.append(f"open {self.name}")
            super().open(slots, slot_bytes, workspace, host)

        def close(self) -> None:
            events.append(f"close {self.name}")
            raise RuntimeError("the device is gone")

    devices = [Recording("test:0", 64 << 20), Recording("test:1", 1000)]
    with pytest.raises(OutOfDeviceMemory, match="test:1"):
        Executor(world.graph, schedule, devices, world, world).run()
    assert events == ["open test:0", "open test:1", "close test:1", "close test:0"]
    with pytest.raises(RuntimeError, match="the device is gone"):  # where nothing else went wrong, it is said
        Executor(world.graph, schedule, [Recording(f"test:{n}", 64 << 20) for n in range(2)], world, world).run()


def test_a_kernel_that_cannot_be_compiled_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes at once, although the first node's chunks never arrive."""
    stuck = threading.Event()

    class Slow(World):
        def read(self, file: Path, offset: int, buffer: memoryview) -> None:
            stuck.wait(60)

    def fail(loops: Compiled) -> None:
        try:
            raise RuntimeError("LLVM rejects the loop")
        finally:
            stuck.set()

    world = Slow()
    world.node("sum", [world.source(4 * ELEMENTS)])
    monkeypatch.setattr(Compiled, "prepare", fail)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="LLVM rejects the loop"):
        Executor(world.graph, with_slots(world, 2), [CpuDevice(1)], world, world).run()
    assert threading.active_count() == before
    assert not world.written


def test_a_function_of_a_method_that_fails_is_an_error_of_the_user() -> None:
    world = World()
    kernel = kernel_of(lambda t: t.other * host(lambda total: 1 / 0, t.sum(t.other)), 1, None, (ELEMENTS,))
    source = world.source(ELEMENTS)
    node = world.graph.add_node(Operation(Kind.MERGE, "failing", kernel=kernel), (source,), F32)
    world.graph.add_output("out", node, 0)
    loops = Compiled(kernel, ("F32",), "F32")
    world.graph.footprints[world.graph.node_class[node]] = Footprint(Line(loops.scratch), Line(loops.allocated))
    with pytest.raises(UsageError, match="merge method failing fails on tensor out: ZeroDivisionError: division by"):
        Executor(world.graph, with_slots(world, 2), [CpuDevice(1)], world, world).run()


def test_scratch_memory_that_was_not_planned_is_refused() -> None:
    world = World()
    world.node("above", [world.source(ELEMENTS)])
    schedule = replace(with_slots(world, 2), workspace=(0,))
    with pytest.raises(MemoryError, match="a kernel needs more scratch memory than was planned"):
        Executor(world.graph, schedule, [CpuDevice(1)], world, world).run()


def test_a_failed_allocation_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match=f"cannot allocate {1 << 60} bytes"):
        take_memory(1 << 60)


def test_a_system_without_more_threads_is_an_error_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    world = World()
    world.node("sum", [world.source(64), world.source(64)])
    schedule = make_schedule(world.graph, Budget(64 << 20, 0, (DeviceBudget("cpu", None, 2),)))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(EnvironmentFailure, match="no more threads can be started"):
        Executor(world.graph, schedule, [CpuDevice(2)], world, world).run()
