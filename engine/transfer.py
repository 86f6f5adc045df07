"""Tensors that are only copied: ranges of source files that become ranges of shards beside the lanes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from .graph import MergeGraph
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


def plan_transfers(graph: MergeGraph, layout: Layout, nodes: Collection[int]) -> list[Transfer]:
    """The transfers that make the outputs of some copying nodes, adjacent ones put together, as their sources lie.

    Args:
        graph: what is made.
        layout: where it lies.
        nodes: which, none without bytes.
    """
    transfers = []
    for number, shard in enumerate(layout.shards):
        run: list[int] = []
        for output in shard.outputs:
            node = graph.outputs[output].node
            if run and not (node in nodes and _continues(graph, layout, run[-1], output)):
                transfers += _cut(graph, layout, number, run)
                run = []
            if node in nodes:
                run.append(output)
        transfers += _cut(graph, layout, number, run)
    return sorted(transfers, key=lambda transfer: (transfer.file, transfer.offset))


def _continues(graph: MergeGraph, layout: Layout, before: int, output: int) -> bool:
    """Whether an output follows another in the source file as it does in the shard."""
    a, b = graph.outputs[before].node, graph.outputs[output].node
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
        failed: called with what it raised, once; the transfers after it are not begun.
    """

    def __init__(
        self,
        transfers: Sequence[Transfer],
        threads: int,
        move: Callable[[int, Transfer], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._left = len(transfers)
        self._changed = threading.Condition()
        self._broken = False
        self._report = failed
        self._move = move
        self.lane: Lane[Transfer] = Lane("copy", max(1, min(threads, len(transfers))), self._perform, self._failed)
        for order, transfer in enumerate(transfers):
            self.lane.put(order, transfer)

    def _perform(self, thread: int, transfer: Transfer) -> None:
        if self._broken:
            return
        self._move(thread, transfer)
        with self._changed:
            self._left -= 1
            self._changed.notify_all()

    def _failed(self, error: BaseException) -> None:
        with self._changed:
            self._broken = True
            self._report(error)
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait so long at most; whether all is moved, or will never be."""
        with self._changed:
            if self._left and not self._broken:
                self._changed.wait(seconds)
            return self._left == 0 or self._broken

    def stop(self) -> None:
        """End the threads once they have done what they are at."""
        self.lane.stop()
        self.lane.join()
