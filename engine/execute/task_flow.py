"""Moves the tasks of a run from state to state, and hands each to the lane that does the work of its state.

This is the only module that knows which state follows which work. It starts no threads and reads no bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..graph.graph import Kind
from ..schedule.step_list import Step
from .cache import CachedChunk
from .devices.base import Device
from .node_state import NodeState
from .slot_allocator import SlotAllocator
from .tasks import ChunkTask, ReadTask, TaskState


class Queues(Protocol):
    """Where tasks wait for the threads that work on them; see `TaskLanes`."""

    def put(self, task: ChunkTask) -> None:
        """Put a task into the lane of its state, if there is one."""

    def put_read(self, order: int, read_task: ReadTask) -> None:
        """Put a chunk to read into the read lane."""


class TaskFlow:
    """The tasks and nodes in progress. Not locked: the executor holds its lock.

    Args:
        slots: slots of the tasks.
        devices: devices of the schedule's budget, in its order.
        queues: lanes that work on the tasks.

    Attributes:
        nodes: nodes in progress, by number.
    """

    def __init__(self, slots: SlotAllocator, devices: Sequence[Device], queues: Queues) -> None:
        self.nodes: dict[int, NodeState] = {}
        self._in_flight = 0  # tasks between PENDING and DONE
        self._uploading = 0  # tasks whose uploads have not ended, some of which may be DONE
        self._slots = slots
        self._devices = devices
        self._queues = queues

    @property
    def idle(self) -> bool:
        """Whether no task is in progress, and no task holds a slot."""
        return self._in_flight == 0 and self._uploading == 0

    def start_step(self, step: Step, chunks: int) -> None:
        """Drop the cached chunks that the schedule drops before a step of a node with this number of chunks."""
        self._slots.drop(step)
        if step.index == 0:
            self.nodes[step.node] = NodeState(chunks)
        if step.first:
            self.nodes[step.node].skip_written(step.first)

    def start(self, step: Step, task: ChunkTask) -> None:
        """Take the slots of a task, which must be free, and load its source chunks."""
        self._in_flight += 1
        self._enter(task, TaskState.LOADING)
        for read_task in self._slots.take(step, task):
            self._queues.put_read(task.order, read_task)
        if task.missing == 0:
            self._loaded(task)

    def chunk_loaded(self, cached: CachedChunk) -> None:
        """Note that a chunk has been read or uploaded, and pass on the tasks that have waited for nothing else."""
        cached.ready = True
        waiting, cached.waiting = cached.waiting, []
        for task in waiting:
            task.missing -= 1
            if task.missing == 0:
                self._loaded(task)

    def uploaded(self, task: ChunkTask) -> None:
        """Pass on a task whose uploads have started: its computation waits for them on the device."""
        self._uploading += 1
        for _, on_device in task.uploads:
            self.chunk_loaded(on_device)
        self._computable(task)

    def upload_settled(self, task: ChunkTask) -> None:
        """Release the chunks in RAM of a task whose uploads have ended."""
        self._uploading -= 1
        self._slots.release_hosts(task)

    def reduced(self, task: ChunkTask, *, complete: bool) -> None:
        """End a task whose partial result is merged. If that has completed its pass, start the next pass."""
        if self._separate(task):
            self._slots.release_device(task)
        else:
            self._slots.release_hosts(task)
        self.end(task)
        for waiting in self.nodes[task.node].next_pass() if complete else ():
            self._enter(waiting, TaskState.COMPUTING)

    def combined(self, task: ChunkTask) -> None:
        """Pass on a task whose output chunk is computed, and in RAM unless a device with its own memory computed it."""
        if self._separate(task):
            self._enter(task, TaskState.DOWNLOADING)
        else:
            self._slots.release_hosts(task)
            self._computed(task)

    def downloaded(self, task: ChunkTask) -> None:
        """Pass on a task whose output chunk has been copied to RAM."""
        self._slots.release_device(task)
        self._computed(task)

    def written(self, task: ChunkTask) -> bool:
        """Free the slots of a task whose output chunk is written; return whether its node is complete.

        The task ends here, unless its node is complete: then `end` is called once the sink has been told.
        """
        if task.operation.kind is Kind.COPY:
            self._slots.release_hosts(task)
        self._slots.free_outputs(task)
        complete = self.nodes[task.node].written()
        if not complete:
            self.end(task)
        return complete

    def end(self, task: ChunkTask) -> None:
        """End a task that has released its slots."""
        self._enter(task, TaskState.DONE)
        self._in_flight -= 1

    def _enter(self, task: ChunkTask, state: TaskState) -> None:
        task.advance(state)
        self._queues.put(task)

    def _separate(self, task: ChunkTask) -> bool:
        return task.operation.kind is Kind.MERGE and self._devices[task.device].separate

    def _loaded(self, task: ChunkTask) -> None:
        """Pass on a task whose source chunks have all been loaded."""
        if task.operation.kind is Kind.COPY:
            self._computed(task)
        elif self._separate(task):
            self._enter(task, TaskState.UPLOADING)
        else:
            self._computable(task)

    def _computable(self, task: ChunkTask) -> None:
        """Pass on a task whose source chunks are where it is computed: now, or once its pass starts."""
        node = self.nodes[task.node]
        if task.index == node.index:
            self._enter(task, TaskState.COMPUTING)
        else:
            self._enter(task, TaskState.WAITING)
            node.wait(task)

    def _computed(self, task: ChunkTask) -> None:
        """Pass on a task whose output chunk is in RAM, and the tasks of the chunks that have waited for this one."""
        self._enter(task, TaskState.COMPUTED)
        if task.kept is not None:
            self.chunk_loaded(task.kept)
        if not task.written:
            self._slots.free_outputs(task)
            self.end(task)
            if self.nodes[task.node].written():
                del self.nodes[task.node]
            return
        for ready in self.nodes[task.node].in_order(task):
            self._enter(ready, TaskState.WRITING)
