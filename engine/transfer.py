"""Tensors that are only copied: ranges of source files that become ranges of shards beside the lanes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from .graph import Kind, MergeGraph
from .lanes import Lane
from .layout import Layout

PART_BYTES = 128 << 20
"""The most bytes that are moved as one, so that several threads share a large file, and progress is seen."""
BUFFER_BYTES = 4 << 20
"""The buffer of each thread that moves bytes."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A contiguous range of a source file that becomes a contiguous range of a shard.

    Args:
        file: the source.
        offset: of the range's first byte there.
        shard: the shard's number.
        target: the offset of the range's first byte in the shard.
        nbytes: its size.
        outputs: the output tensors that lie in it, wholly or in part, with how many bytes of each.
    """

    file: Path
    offset: int
    shard: int
    target: int
    nbytes: int
    outputs: tuple[tuple[int, int], ...]


def plan_transfers(graph: MergeGraph, layout: Layout, done: Mapping[int, int] | None = None) -> list[Transfer]:
    """The transfers that make every copied tensor, adjacent ones put together.

    Args:
        graph: what is made.
        layout: where it lies.
        done: nodes that an earlier run has finished.
    """
    transfers = []
    for number, shard in enumerate(layout.shards):
        run: list[int] = []
        for output in shard.outputs:
            if run and not _continues(graph, layout, run[-1], output):
                transfers += _cut(graph, layout, number, run)
                run = []
            node = graph.outputs[output].node
            if graph.operation(node).kind is Kind.COPY and graph.nbytes(node) and node not in (done or {}):
                run.append(output)
        transfers += _cut(graph, layout, number, run)
    return transfers


def _continues(graph: MergeGraph, layout: Layout, before: int, output: int) -> bool:
    """Whether an output follows another in the source file as it does in the shard."""
    a, b = graph.outputs[before].node, graph.outputs[output].node
    if graph.operation(b).kind is not Kind.COPY:
        return False
    first, second = graph.reads[graph.node_sources[a][0]], graph.reads[graph.node_sources[b][0]]
    adjacent = layout.offset_of[before] + first.nbytes == layout.offset_of[output]
    return adjacent and first.file == second.file and first.offset + first.nbytes == second.offset


def _cut(graph: MergeGraph, layout: Layout, shard: int, run: Sequence[int]) -> list[Transfer]:
    """A run of outputs as transfers of at most PART_BYTES, cut at multiples of it in the shard."""
    if not run:
        return []
    sizes = [graph.nbytes(graph.outputs[output].node) for output in run]
    start = layout.offset_of[run[0]]
    end = start + sum(sizes)
    source = graph.reads[graph.node_sources[graph.outputs[run[0]].node][0]]
    cuts = [start, *range((start // PART_BYTES + 1) * PART_BYTES, end, PART_BYTES), end]
    transfers = []
    place = 0
    for low, high in pairwise(cuts):
        inside = []
        for index in range(place, len(run)):
            first = layout.offset_of[run[index]]
            if first >= high:
                break
            inside.append((run[index], min(high, first + sizes[index]) - max(low, first)))
            if first + sizes[index] <= high:
                place = index + 1
        transfers.append(Transfer(source.file, source.offset + low - start, shard, low, high - low, tuple(inside)))
    return transfers


class Mover:
    """Performs transfers on threads of its own, beside the executor.

    Args:
        transfers: what to move.
        threads: how many at a time.
        move: moves one; called as ``move(thread, transfer)``.
    """

    def __init__(self, transfers: Sequence[Transfer], threads: int, move: Callable[[int, Transfer], None]) -> None:
        self._left = len(transfers)
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._move = move
        self.lane: Lane[Transfer] = Lane("copy", min(threads, max(1, len(transfers))), self._perform, self._failed)
        for order, transfer in enumerate(transfers):
            self.lane.put(order, transfer)

    def _perform(self, thread: int, transfer: Transfer) -> None:
        self._move(thread, transfer)
        with self._changed:
            self._left -= 1
            self._changed.notify_all()

    def _failed(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def wait(self, notify: Callable[[], None]) -> None:
        """Return when all is moved; raise what went wrong. `notify` is called now and then, from this thread."""
        with self._changed:
            while self._left and self._error is None:
                self._changed.wait(0.1)
                notify()
            if self._error is not None:
                raise self._error

    def stop(self) -> None:
        """End the threads once they have done what they are at."""
        self.lane.stop()
        self.lane.join()
