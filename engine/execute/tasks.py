"""The tasks of a run, the states that they pass through, and the interfaces to what they read and write.

The states of a task depend on its kind, and on the device:

    COPY                             PENDING LOADING                               COMPUTED WRITING DONE
    REQUIRE_EQUAL                    PENDING LOADING COMPUTING                     COMPUTED WRITING DONE
    MERGE in RAM, last pass          PENDING LOADING (WAITING) COMPUTING           COMPUTED WRITING DONE
    MERGE in RAM, another pass       PENDING LOADING (WAITING) COMPUTING                            DONE
    MERGE on a device, last pass     PENDING LOADING UPLOADING (WAITING) COMPUTING DOWNLOADING COMPUTED WRITING DONE
    MERGE on a device, another pass  PENDING LOADING UPLOADING (WAITING) COMPUTING                              DONE

A task is WAITING only if its chunks are loaded before the pass before is complete. One whose output only other nodes
use is not WRITING: nothing writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple, Protocol

from ..graph.extents import ByteRange
from ..graph.graph import Operation
from ..schedule.step_list import Step
from .cache import CachedChunk
from .devices.base import Done, Marker


class Source(Protocol):
    """Reads tensor bytes; called from several threads."""

    def read(self, file: Path, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `file` that start at `offset`."""


class Sink(Protocol):
    """Writes output bytes; called from several threads."""

    def write(self, node: int, offset: int, data: memoryview) -> None:
        """Write `data` at byte `offset` of every output tensor of a node.

        The calls for one node start in the order of the offsets, and may overlap.
        """

    def finished(self, node: int) -> None:
        """Note that every byte of a node has been written."""


class TaskState(Enum):
    """The state of a chunk task: what is being done for it, or what it waits for."""

    PENDING = "waits for its slots"
    LOADING = "waits for source chunks that are being read, or uploaded for another task"
    UPLOADING = "its source chunks are copied to the device"
    WAITING = "waits for the end of the pass before"
    COMPUTING = "is computed"
    DOWNLOADING = "its output chunk is copied to RAM"
    COMPUTED = "waits for the chunks before it, since chunks are written in the order of the tensor"
    WRITING = "its output chunk is written"
    DONE = "is over"

    __hash__ = object.__hash__  # that of Enum is a function in Python, which would run several times for each chunk


TRANSITIONS: Mapping[TaskState, tuple[TaskState, ...]] = {
    TaskState.PENDING: (TaskState.LOADING,),
    TaskState.LOADING: (TaskState.COMPUTING, TaskState.UPLOADING, TaskState.WAITING, TaskState.COMPUTED),
    TaskState.UPLOADING: (TaskState.COMPUTING, TaskState.WAITING),
    TaskState.WAITING: (TaskState.COMPUTING,),
    TaskState.COMPUTING: (TaskState.DONE, TaskState.COMPUTED, TaskState.DOWNLOADING),
    TaskState.DOWNLOADING: (TaskState.COMPUTED,),
    TaskState.COMPUTED: (TaskState.WRITING, TaskState.DONE),
    TaskState.WRITING: (TaskState.DONE,),
    TaskState.DONE: (),
}
"""The states that may follow each state."""


class ReadTask(NamedTuple):
    """One chunk to read from a file.

    Args:
        target: cached chunk whose slot receives the bytes.
        read: number of the read.
        ranges: ranges of the tensor, which are put one after another.
    """

    target: CachedChunk
    read: int
    ranges: Sequence[ByteRange]


class OutputChunk(NamedTuple):
    """The chunk of one tensor that a task makes.

    Args:
        node: node of the tensor: the task's, or one of kind `RESULT`.
        slot: slot in RAM; that of the source, if the source is copied.
        on_device: slot on the device, or -1.
        nbytes: size in bytes.
    """

    node: int
    slot: int
    on_device: int
    nbytes: int


class ChunkTask:
    """One chunk of one step, with its slots.

    Attributes:
        state: state of the task; `advance` changes it.
        order: position of the task in the plan.
        node: number of the node.
        index: number of the pass, from 0.
        device: number of the device that computes.
        operation: operation of the node.
        last: whether this pass makes the output.
        chunk: number of the chunk.
        missing: number of source chunks that are still being read or uploaded.
        inputs: chunk of each distinct source, in the memory that the computation reads.
        hosts: chunks in RAM to release once they were used.
        uploads: pairs of a chunk in RAM and its copy on the device.
        outputs: chunk of each tensor that the task makes; none before the last pass.
        kept: chunk of the output that stays cached for the nodes that use it; None if none does.
        written: whether a tensor of the output is made of the chunk.
        marker: point in the device's work to wait for.
    """

    __slots__ = (
        "chunk", "device", "hosts", "index", "inputs", "kept", "last", "marker", "missing", "node", "operation",
        "order", "outputs", "state", "uploads", "written",
    )  # fmt: skip

    def __init__(self, order: int, step: Step, operation: Operation, chunk: int) -> None:
        self.state = TaskState.PENDING
        self.order = order
        self.node = step.node
        self.index = step.index
        self.device = step.device
        self.operation = operation
        self.last = step.index == operation.passes - 1
        self.chunk = chunk
        self.missing = 0
        self.inputs: list[CachedChunk] = []
        self.hosts: list[CachedChunk] = []
        self.uploads: list[tuple[CachedChunk, CachedChunk]] = []
        self.outputs: tuple[OutputChunk, ...] = ()
        self.kept: CachedChunk | None = None
        self.written = True
        self.marker: Marker = Done()

    def __str__(self) -> str:
        return f"chunk {self.chunk} of node {self.node} in pass {self.index}"

    def advance(self, to: TaskState) -> None:
        """Move to another state.

        Raises:
            ValueError: if that state may not follow the current one.
        """
        if to not in TRANSITIONS[self.state]:
            raise ValueError(f"{self} is {self.state.name}, and cannot become {to.name}")
        self.state = to

    def wait_for(self, cached: CachedChunk) -> None:
        """Count `cached` as missing until it is ready."""
        if not cached.ready:
            cached.waiting.append(self)
            self.missing += 1
