"""Tensors that are only copied: ranges of source files that become ranges of shards beside the lanes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Generic, TypeVar

from ...io.output.clone import shareable
from ..execute.lane import Lane
from ..graph.graph import MergeGraph
from ..graph.layout import Layout

PART_BYTES = 128 << 20
"""The most bytes that are copied as one, so that several threads share a large file, and progress is seen."""
SHARED_PART_BYTES = 1 << 30
"""The most bytes that are shared as one, which takes as long as sharing a few."""
BUFFER_BYTES = 1 << 20
"""The buffer of each thread that moves bytes."""
TRANSFER_BYTES = 2 << 10
"""What a transfer takes in the process: itself, and its record on the way to the journal."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Transfer:
    """A contiguous range of a source file that becomes a contiguous range of a shard.

    Args:
        file: the source.
        offset: of the range's first byte there.
        shard: the shard's number.
        target: the offset of the range's first byte in the shard.
        nbytes: its size.
        shares: whether its blocks are to be shared with the source.
    """

    file: Path
    offset: int
    shard: int
    target: int
    nbytes: int
    shares: bool

    @property
    def shared(self) -> int:
        """Bytes that take no space of their own."""
        return shareable(self.offset, self.target, self.nbytes)[1] if self.shares else 0


def source_of(graph: MergeGraph, node: int) -> Path:
    """The file that holds the source of a copying node."""
    return graph.reads[graph.node_sources[node][0]].file


def plan_transfers(
    graph: MergeGraph, layout: Layout, nodes: Collection[int], sharing: Collection[Path]
) -> list[Transfer]:
    """The transfers that make the outputs of some copying nodes, adjacent ones put together, as their sources lie.

    Args:
        graph: what is made.
        layout: where it lies.
        nodes: which, none without bytes.
        sharing: the source files whose blocks are to be shared.
    """
    transfers = []
    for number, shard in enumerate(layout.shards):
        run: list[int] = []
        for output in shard.outputs:
            node = graph.outputs[output].node
            if not graph.nbytes(node):
                continue
            if run and not (node in nodes and _continues(graph, layout, run[-1], output)):
                transfers += _cut(graph, layout, number, run, sharing)
                run = []
            if node in nodes:
                run.append(output)
        transfers += _cut(graph, layout, number, run, sharing)
    return sorted(transfers, key=lambda transfer: (transfer.file, transfer.offset))


def _continues(graph: MergeGraph, layout: Layout, before: int, output: int) -> bool:
    """Whether an output follows another in the source file as it does in the shard."""
    a, b = graph.outputs[before].node, graph.outputs[output].node
    first, second = graph.reads[graph.node_sources[a][0]], graph.reads[graph.node_sources[b][0]]
    adjacent = layout.offset_of[before] + first.nbytes == layout.offset_of[output]
    return adjacent and first.file == second.file and first.offset + first.nbytes == second.offset


def _cut(
    graph: MergeGraph, layout: Layout, shard: int, run: Sequence[int], sharing: Collection[Path]
) -> list[Transfer]:
    """A run of outputs as transfers of limited size, cut where blocks end in the shard."""
    if not run:
        return []
    source = graph.reads[graph.node_sources[graph.outputs[run[0]].node][0]]
    start = layout.offset_of[run[0]]
    end = layout.offset_of[run[-1]] + graph.nbytes(graph.outputs[run[-1]].node)
    shares = source.file in sharing
    part = SHARED_PART_BYTES if shares else PART_BYTES
    cuts = [start, *range((start // part + 1) * part, end, part), end]
    shift = source.offset - start
    return [Transfer(source.file, low + shift, shard, low, high - low, shares) for low, high in pairwise(cuts)]


def written_ranges(graph: MergeGraph, layout: Layout, transfers: Sequence[Transfer]) -> list[list[tuple[int, int]]]:
    """For each shard the ranges (offset, bytes) that need disk space of their own: all but what is to be shared.

    Of a range that is to be shared the partial blocks at its edges are left out too.
    """
    shared: dict[int, list[tuple[int, int]]] = {}
    for transfer in sorted(transfers, key=lambda each: (each.shard, each.target)):
        if transfer.shares:
            shared.setdefault(transfer.shard, []).append((transfer.target, transfer.target + transfer.nbytes))
    found = []
    for number, shard in enumerate(layout.shards):
        ranges = []
        place = len(shard.header)
        for first, end in [*shared.get(number, ()), (shard.nbytes, shard.nbytes)]:
            if first > place:
                ranges.append((place, first - place))
            place = end
        found.append(ranges)
    return found


class WorkerPool(Generic[T]):
    """Does many pieces of work on threads of its own, beside the executor.

    Args:
        pieces: such as transfers.
        threads: how many at a time.
        work: does one; called as ``work(thread, piece)``.
        failed: called with what it raised; the pieces after it are not begun.
    """

    def __init__(
        self,
        pieces: Sequence[T],
        threads: int,
        work: Callable[[int, T], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._left = len(pieces)
        self._changed = threading.Condition()
        self._broken = False
        self._report = failed
        self._work = work
        self.lane: Lane[T] = Lane("copy", max(1, min(threads, len(pieces))), self._perform, self._failed)
        for order, piece in enumerate(pieces):
            self.lane.put(order, piece)

    def _perform(self, thread: int, piece: T) -> None:
        if self._broken:
            return
        self._work(thread, piece)
        with self._changed:
            self._left -= 1
            if self._left == 0:
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
