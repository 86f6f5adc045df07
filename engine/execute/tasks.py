"""Data types of a run: tasks, the state of nodes in progress, progress, and measurements."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...methods.kernel.kernel import Kernel
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


@dataclass(slots=True)
class Progress:
    """The progress of a run; the counts only grow.

    Args:
        bytes_read: tensor bytes read.
        bytes_written: tensor bytes written.
        bytes_checked: bytes of an interrupted merge that have been checked.
        bytes_to_check: bytes of an interrupted merge to check; 0 once the merge itself is running.
        bytes_earlier: bytes of `bytes_read` and `bytes_written` that earlier runs of a resumed merge have moved.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    bytes_checked: int = 0
    bytes_to_check: int = 0
    bytes_earlier: int = 0


@dataclass(slots=True)
class LaneTime:
    """The time that a lane's threads worked and waited.

    Args:
        threads: number of threads.
        worked: seconds of work, summed over all threads.
        waited: seconds of waiting, summed over all threads.
        levels: seconds with 0, 1, 2, ... threads at work.
    """

    threads: int
    worked: float
    waited: float
    levels: tuple[float, ...] = ()

    @property
    def effective_threads(self) -> int:
        """Highest number of threads that were at work together for at least a twentieth of the time."""
        total = sum(self.levels)
        return max((n for n in range(len(self.levels)) if sum(self.levels[n:]) >= total / 20), default=0)


@dataclass(slots=True)
class Measured:
    """Measurements of a run.

    Args:
        bytes_read: tensor bytes read.
        bytes_written: tensor bytes written.
        bytes_shared: tensor bytes in reflinked disk blocks.
        bytes_checked: bytes that were read only to check them: of an interrupted merge and its sources, and of buffers.
        refused: tensor bytes that could not be reflinked and were copied, by the error number.
        seconds: seconds from the first step to the end.
        ram_peak: highest number of bytes in slots of RAM.
        vram_peak: highest number of bytes held on a device.
        lanes: time of each lane, by name.
        overflowed: number of new infinities or NaNs, by output tensor.
        reduced_vram: reduced VRAM limit in bytes, by GPU with less free memory than planned.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    bytes_shared: int = 0
    bytes_checked: int = 0
    refused: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    ram_peak: int = 0
    vram_peak: int = 0
    lanes: dict[str, LaneTime] = field(default_factory=dict)
    overflowed: dict[str, int] = field(default_factory=dict, repr=False)
    reduced_vram: dict[str, int] = field(default_factory=dict)


class ReadTask(NamedTuple):
    """One chunk to read from a file.

    Args:
        target: cached chunk whose slot receives the bytes.
        read: number of the read.
        offset: offset of the chunk in the file in bytes.
        nbytes: size of the chunk in bytes.
    """

    target: CachedChunk
    read: int
    offset: int
    nbytes: int


class ChunkTask:
    """One chunk of one step, with its slots.

    Attributes:
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
        out: slot in RAM for the output chunk, or -1.
        out_device: slot on the device for the output chunk, or -1.
        out_nbytes: size of the output chunk in bytes.
        marker: point in the device's work to wait for.
    """

    __slots__ = (
        "chunk", "device", "hosts", "index", "inputs", "last", "marker", "missing", "node", "operation", "order",
        "out", "out_device", "out_nbytes", "uploads",
    )  # fmt: skip

    def __init__(self, order: int, step: Step, operation: Operation, chunk: int) -> None:
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
        self.out = -1
        self.out_device = -1
        self.out_nbytes = 0
        self.marker: Marker = Done()

    def wait_for(self, cached: CachedChunk) -> None:
        """Count `cached` as missing until it is ready."""
        if not cached.ready:
            cached.waiting.append(self)
            self.missing += 1


class NodeState:
    """The state of a node in progress: its current pass, and which chunks are computed and written."""

    __slots__ = (
        "_lock", "_merged", "_next", "_partials", "chunks", "computed", "index", "next_write", "state", "unwritten",
        "waiting",
    )  # fmt: skip

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self.next_write = 0
        self.computed: dict[int, ChunkTask] = {}
        self.unwritten = chunks
        self.index = 0
        self.state: Any = None
        self.waiting: list[ChunkTask] = []
        self._lock = threading.Lock()
        self._partials: dict[int, Any] = {}
        self._next = 0
        self._merged: Any = None

    def merge(self, kernel: Kernel, index: int, chunk: int, partial: Any) -> bool:
        """Merge a chunk's partial result of a pass, in the order of the chunks; return whether the pass is complete.

        Several threads may call it. Once the pass is complete, `state` holds its result.
        """
        with self._lock:
            self._partials[chunk] = partial
            while self._next in self._partials:
                following = self._partials.pop(self._next)
                if following is not None:
                    self._merged = following if self._merged is None else kernel.merge(index, self._merged, following)
                self._next += 1
            if self._next < self.chunks:
                return False
            if kernel.needed(index, self.state):
                self.state = kernel.finish(index, self._merged, self.state)
            self._next, self._merged = 0, None
            return True
