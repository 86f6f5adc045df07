"""The states of a task: which may follow which, and those that the tasks of real runs pass through."""

from __future__ import annotations

import threading
from collections import defaultdict
from itertools import pairwise, product

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mergeloom.engine.execute.devices.base import Device
from mergeloom.engine.execute.devices.cpu import CpuDevice
from mergeloom.engine.execute.tasks import ChunkTask, TaskState
from mergeloom.engine.graph.graph import Kind
from mergeloom.engine.schedule.budget import Budget, DeviceBudget
from mergeloom.engine.schedule.schedule import Schedule, make_schedule
from tests.examples import examples
from tests.support.blueprints import SLOT, Blueprint, blueprints, build, execute
from tests.support.devices import CountingDevice
from tests.support.graphs import World

PATHS = {
    "copy": "PENDING LOADING COMPUTED WRITING DONE",
    "equal": "PENDING LOADING COMPUTING COMPUTED WRITING DONE",
    "output in RAM": "PENDING LOADING WAITING COMPUTING COMPUTED WRITING DONE",
    "intermediate in RAM": "PENDING LOADING WAITING COMPUTING COMPUTED DONE",
    "pass in RAM": "PENDING LOADING WAITING COMPUTING DONE",
    "output on a device": "PENDING LOADING UPLOADING WAITING COMPUTING DOWNLOADING COMPUTED WRITING DONE",
    "intermediate on a device": "PENDING LOADING UPLOADING WAITING COMPUTING DOWNLOADING COMPUTED DONE",
    "pass on a device": "PENDING LOADING UPLOADING WAITING COMPUTING DONE",
}
"""The states of each kind of task. A task whose pass has started by the time its chunks are loaded is not WAITING."""


def allowed_transitions() -> set[tuple[str, str]]:
    """Every pair of neighbors in the paths, with WAITING and without."""
    paths = [path.split() for path in PATHS.values()]
    shorter = [[state for state in path if state != "WAITING"] for path in paths]
    return {pair for path in [*paths, *shorter] for pair in pairwise(path)}


def a_task() -> ChunkTask:
    """The task of the second chunk of a copy."""
    world = World()
    node = world.node("copy", [world.source(64)])
    schedule = make_schedule(world.graph, Budget(1 << 30, 0, (DeviceBudget("cpu", None, 1),)))
    return ChunkTask(1, schedule.steps[0], world.graph.operation(node), 1)


@pytest.mark.parametrize(("before", "after"), list(product(TaskState, TaskState)), ids=lambda state: state.name)
def test_only_the_transitions_of_some_task_are_allowed(before: TaskState, after: TaskState) -> None:
    task = a_task()
    task.state = before
    if (before.name, after.name) in allowed_transitions():
        task.advance(after)
        assert task.state is after
        return
    message = f"chunk 1 of node 0 in pass 0 is {before.name}, and cannot become {after.name}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        task.advance(after)
    assert task.state is before


# ------------------------------------------------------------------------------------------------ real runs

Recorded = dict[ChunkTask, list[str]]


def recorded_states(world: World, schedule: Schedule, devices: list[Device], *, serial: bool) -> Recorded:
    """Execute a schedule; return the states of each of its tasks, in order."""
    states: Recorded = {}
    advance = ChunkTask.advance

    def record(task: ChunkTask, to: TaskState) -> None:
        before = task.state.name
        advance(task, to)
        states.setdefault(task, [before]).append(to.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkTask, "advance", record)
        execute(world, schedule, devices, serial=serial)
    return states


def path_of(task: ChunkTask, world: World, devices: list[Device]) -> list[str]:
    """The longest path of a task."""
    if task.operation.kind is not Kind.MERGE:
        return PATHS[task.operation.method].split()
    part = "pass"
    if task.index == task.operation.passes - 1:
        part = "output" if world.graph.destinations()[task.node] else "intermediate"
    return PATHS[f"{part} on a device" if devices[task.device].separate else f"{part} in RAM"].split()


def check_states(states: Recorded, schedule: Schedule, world: World, devices: list[Device]) -> None:
    """Check that there is a task for every chunk of every step, and that each passed through its states."""
    chunks = [schedule.chunks(world.graph, step.node) - step.first for step in schedule.steps]
    assert len(states) == sum(chunks)
    for task, passed in states.items():
        path = path_of(task, world, devices)
        waits = task.index > 0 and "WAITING" in passed
        assert passed == [state for state in path if waits or state != "WAITING"]


# one in which every kind of task occurs, with more slots than it needs, so passes are read ahead
@example([(3 * SLOT // 4, "F32", 2, [("above", [0, 1], 1), ("sum", [1], 2), ("copy", [0], 1)])], 2, 20, False)
@example([(3 * SLOT // 4, "F32", 2, [("above", [0, 1], 1), ("sum", [1], 2), ("copy", [0], 1)])], 0, 20, False)
@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(blueprints(), st.integers(0, 2), st.sampled_from([0, 1, 3, 20]), st.booleans())
def test_every_task_passes_through_its_states(blueprint: Blueprint, count: int, extra: int, serial: bool) -> None:
    world = build(blueprint)
    equal = [world.source(SLOT // 2, seed=0), world.source(SLOT // 2, seed=0)]
    world.node("equal", equal)
    total = world.node("above", equal, outputs=0)
    for other in (world.node("sum", [equal[0], ~total]), total):
        world.node("sum", [equal[1], ~other])
    large = tuple(DeviceBudget(f"test:{n}", 1 << 40, 2) for n in range(count)) or (DeviceBudget("cpu", None, 2),)
    least = make_schedule(world.graph, Budget(1 << 40, 0, large), slot_bytes=SLOT)
    vram = least.minimum_vram + extra * SLOT if count else None
    budgets = tuple(DeviceBudget(each.name, vram, each.threads) for each in large)
    ram = least.minimum_ram + (8 + extra) * SLOT  # eight for the intermediate tensors
    schedule = make_schedule(world.graph, Budget(ram, 0, budgets), slot_bytes=SLOT)
    devices: list[Device] = [CountingDevice(each.name, vram, 2) if vram else CpuDevice(2) for each in budgets]
    check_states(recorded_states(world, schedule, devices, serial=serial), schedule, world, devices)


def test_a_later_pass_waits_for_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass ends only when the chunks of the others are loaded: their tasks wait for it."""
    from mergeloom.engine.execute.compute.runner import KernelRunner

    world = World()
    world.node("above", [world.source(2 * SLOT // 4)])
    schedule = make_schedule(world.graph, Budget(1 << 30, 0, (DeviceBudget("cpu", None, 1),)), slot_bytes=SLOT)
    waiting, advance, reduce = threading.Semaphore(0), ChunkTask.advance, KernelRunner.reduce
    by_pass: dict[int, list[str]] = defaultdict(list)

    def note(task: ChunkTask, to: TaskState) -> None:
        advance(task, to)
        by_pass[task.index].append(to.name)
        if to is TaskState.WAITING:
            waiting.release()

    def late(self: KernelRunner, thread: int, task: ChunkTask, state: object) -> object:
        if (task.index, task.chunk) == (0, 0):
            for _ in range(4):
                assert waiting.acquire(timeout=300)
        return reduce(self, thread, task, state)

    monkeypatch.setattr(ChunkTask, "advance", note)
    monkeypatch.setattr(KernelRunner, "reduce", late)
    execute(world, schedule, [CpuDevice(1)])
    assert "WAITING" not in by_pass[0]
    assert by_pass[1].count("WAITING") == by_pass[2].count("WAITING") == 2
