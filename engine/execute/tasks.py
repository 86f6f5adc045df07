"""What flows through the executor: pieces of work, how far they are, and what was measured."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ...methods.kernel.contract import Kernel
from ..graph.graph import Operation
from ..schedule.simulate import Step
from .cache import CachedChunk
from .devices.base import Done, Marker


class Source(Protocol):
    """Where tensor bytes come from; called from several threads."""

    def read(self, file: Path, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `file` from `offset` on."""


class Sink(Protocol):
    """Where output bytes go; called from several threads."""

    def write(self, node: int, offset: int, data: memoryview) -> None:
        """Put `data` at byte `offset` of every output tensor of a node.

        The calls for one node begin in the order of the offsets, and may overlap.
        """

    def finished(self, node: int) -> None:
        """Every byte of a node has been written."""


@dataclass(slots=True)
class Progress:
    """How far a run is; its fields only grow.

    Args:
        bytes_read: tensor bytes read.
        bytes_written: tensor bytes written.
        bytes_checked: bytes of an unfinished merge that were checked, while it is being checked.
        bytes_to_check: all bytes that are to be checked; 0 once the merge itself is at work.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    bytes_checked: int = 0
    bytes_to_check: int = 0


@dataclass(slots=True)
class LaneTime:
    """What a lane did.

    Args:
        threads: how many it has.
        worked: seconds, over all its threads.
        waited: seconds, over all its threads.
        levels: seconds with 0, 1, 2, ... of its threads at work.
    """

    threads: int
    worked: float
    waited: float
    levels: tuple[float, ...] = ()

    @property
    def effective_threads(self) -> int:
        """How many threads still helped: the most that were at work at once for a twentieth of the time or longer."""
        total = sum(self.levels)
        return max((n for n in range(len(self.levels)) if sum(self.levels[n:]) >= total / 20), default=0)


@dataclass(slots=True)
class Measured:
    """What a run did.

    Args:
        bytes_read: tensor bytes read.
        bytes_written: tensor bytes written.
        bytes_shared: tensor bytes whose disk blocks are the sources' own.
        bytes_checked: bytes of an unfinished merge, and of its sources, that were read to check it before it was
            resumed.
        refused: tensor bytes that were to be shared and had to be copied, by the error number of the refusal.
        seconds: from the first step to the last.
        ram_peak: the most bytes of slots held in RAM.
        vram_peak: the most bytes held on a device.
        lanes: what each lane did.
        overflowed: for each output tensor with new infinities or NaNs, how many.
        squeezed: GPUs of which others held more than was foretold, and the bytes that were made do with.
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
    overflowed: dict[str, int] = field(default_factory=dict)
    reduced_vram: dict[str, int] = field(default_factory=dict)


class ChunkTask:
    """One chunk of one step, with its slots."""

    __slots__ = (
        "chunk", "device", "hosts", "index", "last", "marker", "missing", "node", "operation", "order", "out",
        "out_device", "out_nbytes", "residents", "uploads",
    )  # fmt: skip

    def __init__(self, order: int, step: Step, operation: Operation, chunk: int) -> None:
        self.order = order
        self.node = step.node
        self.index = step.index
        self.device = step.device
        self.operation = operation
        self.last = step.index == operation.passes - 1
        self.chunk = chunk
        self.missing = 0  # chunks that are still being read or uploaded
        self.residents: list[CachedChunk] = []  # where the computation finds each distinct source
        self.hosts: list[CachedChunk] = []  # slots in RAM to give back when they were used
        self.uploads: list[tuple[CachedChunk, CachedChunk]] = []
        self.out = -1
        self.out_device = -1
        self.out_nbytes = 0
        self.marker: Marker = Done()

    def await_(self, resident: CachedChunk) -> None:
        """Count `resident` as missing until it is ready."""
        if not resident.ready:
            resident.waiting.append(self)
            self.missing += 1


class NodeState:
    """A node that is being made: which pass it is in, and what of it is computed and written."""

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
        """Merge a chunk's partial of a pass, in the order of the chunks; whether that was the last one.

        It is safe to call from several threads. After the last one, `state` is what the pass has found.
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
