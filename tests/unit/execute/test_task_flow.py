"""The flow of tasks without threads: what follows each piece of work, in an order that a test chooses."""

from __future__ import annotations

import pytest

from mergeloom.engine.execute.devices.base import Device
from mergeloom.engine.execute.devices.cpu import CpuDevice
from mergeloom.engine.execute.slot_allocator import SlotAllocator
from mergeloom.engine.execute.task_flow import TaskFlow
from mergeloom.engine.execute.tasks import ChunkTask, ReadTask, TaskState
from mergeloom.engine.schedule.budget import Budget, DeviceBudget
from mergeloom.engine.schedule.schedule import make_schedule
from tests.support.blueprints import ELEMENTS, SLOT
from tests.support.devices import CountingDevice
from tests.support.graphs import World


class Flow:
    """The flow of a world of one node, with all its tasks started; it records what reaches the lanes."""

    def __init__(self, world: World, *, separate: bool = False) -> None:
        budget = DeviceBudget("test" if separate else "cpu", 64 << 20 if separate else None, 1)
        schedule = make_schedule(world.graph, Budget(64 << 20, 0, (budget,)), slot_bytes=SLOT)
        devices: list[Device] = [CountingDevice("test", 64 << 20) if separate else CpuDevice(1)]
        self.slots = SlotAllocator(world.graph, schedule, devices)
        self.flow = TaskFlow(self.slots, devices, self)
        self.queued: list[tuple[TaskState, int, int]] = []
        self.reads: list[ReadTask] = []
        self.tasks: dict[tuple[int, int], ChunkTask] = {}
        for step in schedule.steps:
            chunks = schedule.chunks(world.graph, step.node)
            self.flow.start_step(step, chunks)
            for chunk in range(chunks):
                task = ChunkTask(len(self.tasks), step, world.graph.operation(step.node), chunk)
                assert self.slots.available(step, task)
                self.flow.start(step, task)
                self.tasks[step.index, chunk] = task

    def put(self, task: ChunkTask) -> None:
        """Record that a task has entered a state."""
        self.queued.append((task.state, task.index, task.chunk))

    def put_read(self, order: int, read_task: ReadTask) -> None:
        """Record a chunk to read."""
        self.reads.append(read_task)

    def load(self) -> None:
        """Load all chunks that the tasks have asked for."""
        for read_task in self.reads:
            self.flow.chunk_loaded(read_task.target)
        self.reads.clear()

    def states(self, index: int) -> list[str]:
        """The states of the tasks of a pass."""
        return [task.state.name for (number, _), task in self.tasks.items() if number == index]


def world_of(kind: str, chunks: int) -> World:
    """A world of one node on one source of several chunks."""
    world = World()
    world.node(kind, [world.source(chunks * ELEMENTS)])
    return world


def test_a_task_is_loading_until_its_last_chunk_is_loaded() -> None:
    world = World()
    world.node("sum", [world.source(ELEMENTS), world.source(ELEMENTS)])
    flow = Flow(world)
    first, last = flow.reads
    flow.flow.chunk_loaded(last.target)
    assert flow.states(0) == ["LOADING"]
    flow.flow.chunk_loaded(first.target)
    assert flow.states(0) == ["COMPUTING"]


@pytest.mark.parametrize("separate", [False, True])
def test_chunks_are_written_in_the_order_of_the_tensor(separate: bool) -> None:
    flow = Flow(world_of("sum", 3), separate=separate)
    flow.load()
    tasks = [flow.tasks[0, chunk] for chunk in range(3)]
    for task in tasks if separate else ():
        flow.flow.uploaded(task)
    for chunk in (2, 0, 1):
        flow.flow.combined(tasks[chunk])
        if separate:
            flow.flow.downloaded(tasks[chunk])
        if chunk == 0:
            assert flow.states(0) == ["WRITING", "COMPUTING", "COMPUTED"]
    assert [chunk for state, _, chunk in flow.queued if state is TaskState.WRITING] == [0, 1, 2]
    assert [flow.flow.written(tasks[chunk]) for chunk in (1, 2, 0)] == [False, False, True]
    assert flow.states(0) == ["WRITING", "DONE", "DONE"]  # the last one to be written waits for the sink
    assert not flow.flow.idle
    flow.flow.end(tasks[0])
    assert flow.flow.idle == (not separate)
    for task in tasks if separate else ():
        assert not flow.flow.idle  # its uploads may still read a slot
        flow.flow.upload_settled(task)
    assert flow.flow.idle
    assert flow.slots.all_free


def test_a_pass_starts_once_the_one_before_is_complete() -> None:
    flow = Flow(world_of("above", 2))
    flow.load()
    assert [flow.states(index) for index in range(3)] == [["COMPUTING"] * 2, ["WAITING"] * 2, ["WAITING"] * 2]
    flow.flow.reduced(flow.tasks[0, 1], complete=False)
    assert [flow.states(index) for index in range(2)] == [["COMPUTING", "DONE"], ["WAITING"] * 2]
    flow.flow.reduced(flow.tasks[0, 0], complete=True)
    assert [flow.states(index) for index in range(3)] == [["DONE"] * 2, ["COMPUTING"] * 2, ["WAITING"] * 2]
    for chunk in range(2):
        flow.flow.reduced(flow.tasks[1, chunk], complete=chunk == 1)
    assert flow.states(2) == ["COMPUTING"] * 2
    assert not flow.flow.idle


def test_a_copy_is_not_computed() -> None:
    flow = Flow(world_of("copy", 1), separate=True)
    flow.load()
    assert flow.queued == [(TaskState[name], 0, 0) for name in ("LOADING", "COMPUTED", "WRITING")]


def test_work_that_is_reported_twice_is_refused() -> None:
    flow = Flow(world_of("sum", 2))
    flow.load()
    task = flow.tasks[0, 0]
    flow.flow.combined(task)
    with pytest.raises(ValueError, match="chunk 0 of node 0 in pass 0 is WRITING, and cannot become COMPUTED"):
        flow.flow.combined(task)
    flow.flow.written(task)
    with pytest.raises(ValueError, match="is DONE, and cannot become DONE"):
        flow.flow.end(task)
