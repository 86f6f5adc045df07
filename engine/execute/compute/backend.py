"""The interface between the executor and a backend, which computes the chunks of one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...graph.extents import length, staged_whole
from ...graph.graph import MergeGraph
from ...schedule.schedule import Schedule
from ..cache import CachedChunk
from ..tasks import ChunkTask

Failed = Callable[[BaseException], None]
"""Function that ends the run with an error, called from any thread."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found while a chunk was computed.

    Args:
        nonfinite_inputs: numbers of the sources with a NaN or an infinity in the chunk.
        overflowed: number of output elements that are not finite although all inputs are.
        byproducts: for each by-product of the kernel, its sum over each block of elements.
    """

    nonfinite_inputs: tuple[int, ...] = ()
    overflowed: int = 0
    byproducts: Sequence[Sequence[float]] = ()


class Computer(Protocol):
    """The backend of one device. The device's compute threads call the methods that have a `thread`."""

    def open(self, arena: memoryview, failed: Failed) -> None:
        """Prepare for a run.

        Args:
            arena: arena in RAM.
            failed: function for errors of threads that the backend starts.
        """

    def begin(self, thread: int, task: ChunkTask) -> None:
        """Make a thread ready for a task, before any other method is called with it."""

    def check_inputs(self, thread: int, task: ChunkTask) -> tuple[int, ...]:
        """Return the numbers of the sources that hold a NaN or an infinity in the chunk; quick if there are none."""

    def reduce(self, thread: int, task: ChunkTask, state: Any) -> Any:
        """Return the partial result of the task's pass for the chunk."""

    def combine(self, thread: int, task: ChunkTask, state: Any) -> Outcome:
        """Compute the chunk of the output: into the task's slot on the device, or in RAM if it has none of its own."""

    def close(self) -> None:
        """End the threads that `open` started, and drop every reference to the arena and the workspaces."""


def staged_ranges(graph: MergeGraph, schedule: Schedule, task: ChunkTask) -> tuple[tuple[int, int], ...]:
    """Return for each source the first element and the number of elements of the output that it is staged for.

    Empty if every source is staged for the task's chunk.
    """
    if not graph.access_numbers(task.node):
        return ()
    chunk, complete = schedule.span(graph, task.node, task.chunk), (0, length(graph, task.node))
    places = range(len(graph.node_sources[task.node]))
    return tuple(complete if staged_whole(graph, task.node, p, schedule.slot_bytes) else chunk for p in places)


def task_inputs(graph: MergeGraph, task: ChunkTask) -> list[CachedChunk]:
    """Return the chunk of each source of a task's node, in recipe order. A source can occur more than once."""
    sources = graph.node_sources[task.node]
    if len(task.inputs) == len(sources):
        return task.inputs
    accesses = graph.access_numbers(task.node) or (0,) * len(sources)
    keys = list(zip(sources, accesses, strict=True))
    chunks = dict(zip(dict.fromkeys(keys), task.inputs, strict=True))
    return [chunks[key] for key in keys]
