"""The bookkeeping of a node in progress: its current pass, and which of its chunks are computed and written."""

from __future__ import annotations

import threading
from typing import Any

from ...methods.kernel.kernel import Kernel
from .tasks import ChunkTask


class Reducer:
    """Merges the partial results of a node's passes in the order of the chunks. Thread-safe.

    Args:
        chunks: number of chunks of the node.

    Attributes:
        state: result of the passes that are complete.
    """

    __slots__ = ("_chunks", "_lock", "_merged", "_next", "_partials", "state")

    def __init__(self, chunks: int) -> None:
        self.state: Any = None
        self._chunks = chunks
        self._lock = threading.Lock()
        self._partials: dict[int, Any] = {}
        self._next = 0
        self._merged: Any = None

    def merge(self, kernel: Kernel, index: int, chunk: int, partial: Any) -> bool:
        """Merge a chunk's partial result of pass `index`; return whether the pass is complete, and `state` its result.

        The state is read by tasks of later passes only, which start after this has returned.
        """
        with self._lock:
            self._partials[chunk] = partial
            while self._next in self._partials:
                following = self._partials.pop(self._next)
                if following is not None:
                    self._merged = following if self._merged is None else kernel.merge(index, self._merged, following)
                self._next += 1
            if self._next < self._chunks:
                return False
            if kernel.needed(index, self.state):
                self.state = kernel.finish(index, self._merged, self.state)
            self._next, self._merged = 0, None
            return True


class NodeState:
    """The state of a node in progress. Not locked, except for its reducer: the executor holds its lock.

    Args:
        chunks: number of chunks of the node.

    Attributes:
        index: number of the pass that can be computed, from 0.
        reducer: merges the partial results of the passes.
    """

    __slots__ = ("_computed", "_next_write", "_unwritten", "_waiting", "index", "reducer")

    def __init__(self, chunks: int) -> None:
        self.index = 0
        self.reducer = Reducer(chunks)
        self._waiting: list[ChunkTask] = []
        self._computed: dict[int, ChunkTask] = {}
        self._next_write = 0
        self._unwritten = chunks

    def skip_written(self, chunks: int) -> None:
        """Count the first `chunks` chunks, which an earlier run wrote, as written."""
        self._next_write = chunks
        self._unwritten -= chunks

    def wait(self, task: ChunkTask) -> None:
        """Keep a task of a later pass until that pass starts."""
        self._waiting.append(task)

    def next_pass(self) -> list[ChunkTask]:
        """Start the next pass; return its tasks that wait for it."""
        self.index += 1
        ready = [task for task in self._waiting if task.index == self.index]
        self._waiting = [task for task in self._waiting if task.index != self.index]
        return ready

    def in_order(self, task: ChunkTask) -> list[ChunkTask]:
        """Note that a chunk is computed; return the tasks whose chunks follow the last one returned without a gap."""
        self._computed[task.chunk] = task
        ready = []
        while (following := self._computed.pop(self._next_write, None)) is not None:
            ready.append(following)
            self._next_write += 1
        return ready

    def written(self) -> bool:
        """Note that one more chunk is written; return whether all are."""
        self._unwritten -= 1
        return self._unwritten == 0
