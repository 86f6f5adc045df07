"""Plans bulk copies: ranges of source files that become ranges of shards without passing through the lanes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Generic, TypeVar

from ...io.output.clone import shareable
from ...io.output.group_commit import Aborted
from ...io.task_group import TaskGroup
from ..execute.lanes import Lane
from ..graph.graph import MergeGraph
from ..graph.layout import Layout

PART_BYTES = 128 << 20
"""Maximum size in bytes of a transfer that is copied. Several threads share a large file, and progress is visible."""
SHARED_PART_BYTES = 1 << 30
"""Maximum size in bytes of a transfer that is reflinked, which takes equally long for any size."""
BUFFER_BYTES = 1 << 20
"""Size in bytes of the buffer of each copying thread."""
TRANSFER_BYTES = 2 << 10
"""Memory that a transfer takes in the process, in bytes: the object itself, and its record until it is journaled."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Transfer:
    """A contiguous range of a source file that becomes a contiguous range of a shard.

    Args:
        file: source file.
        offset: offset of the range in the source file.
        shard: number of the shard.
        target: offset of the range in the shard.
        nbytes: size of the range in bytes.
        shares: whether the range is reflinked, so its blocks are shared with the source.
    """

    file: Path
    offset: int
    shard: int
    target: int
    nbytes: int
    shares: bool

    @property
    def shared(self) -> int:
        """Number of bytes that take no disk space of their own."""
        return shareable(self.offset, self.target, self.nbytes)[1] if self.shares else 0


def source_of(graph: MergeGraph, node: int) -> Path:
    """Return the file that holds the source of a copying node."""
    return graph.reads[graph.node_sources[node][0]].file


def plan_transfers(
    graph: MergeGraph, layout: Layout, nodes: Collection[int], sharing: Collection[Path]
) -> list[Transfer]:
    """Plan the transfers that make the outputs of copying nodes. Adjacent tensors are one transfer.

    Args:
        graph: merge graph.
        layout: layout of the output.
        nodes: numbers of the copying nodes; none of them is empty.
        sharing: source files whose tensors are reflinked.

    Returns:
        The transfers in the order of their source files and offsets.
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
    """Whether two outputs are adjacent both in the shard and in the source file."""
    a, b = graph.outputs[before].node, graph.outputs[output].node
    first, second = graph.reads[graph.node_sources[a][0]], graph.reads[graph.node_sources[b][0]]
    adjacent = layout.offset_of[before] + first.nbytes == layout.offset_of[output]
    return adjacent and first.file == second.file and first.offset + first.nbytes == second.offset


def _cut(
    graph: MergeGraph, layout: Layout, shard: int, run: Sequence[int], sharing: Collection[Path]
) -> list[Transfer]:
    """Split a run of adjacent outputs into transfers of limited size, at multiples of that size in the shard."""
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
    """Return the ranges (offset, nbytes) of each shard that need disk space of their own: all that are not reflinked.

    The partial blocks at the edges of a reflinked range are not included, although they take space.
    """
    shared: dict[int, list[tuple[int, int]]] = {}
    for transfer in sorted(transfers, key=lambda each: (each.shard, each.target)):
        if transfer.shares:
            shared.setdefault(transfer.shard, []).append((transfer.target, transfer.target + transfer.nbytes))
    written = []
    for number, shard in enumerate(layout.shards):
        ranges = []
        position = shard.data_start
        for first, end in [*shared.get(number, ()), (shard.nbytes, shard.nbytes)]:
            if first > position:
                ranges.append((position, first - position))
            position = end
        written.append(ranges)
    return written


class WorkerPool(Generic[T]):
    """Runs tasks of one kind in threads of its own, concurrently with the executor's lanes.

    The first error of a task fails the group. Once the group is cancelled, by whomever, no more tasks start.

    Args:
        tasks: tasks, such as transfers, in the order in which they start.
        threads: maximum number of threads.
        work: function that performs a task; called as ``work(thread, task)``.
        group: task group that gets the errors.
    """

    def __init__(self, tasks: Sequence[T], threads: int, work: Callable[[int, T], None], group: TaskGroup) -> None:
        self._left = len(tasks)
        self._changed = threading.Condition()
        self._group = group
        self._work = work
        self.lane: Lane[T] = Lane("copy", max(1, min(threads, len(tasks))), self._perform, self._failed)
        for order, task in enumerate(tasks):
            self.lane.put(order, task)

    def _perform(self, thread: int, task: T) -> None:
        if self._group.cancelled:
            return
        self._work(thread, task)
        with self._changed:
            self._left -= 1
            if self._left == 0:
                self._changed.notify_all()

    def _failed(self, error: BaseException) -> None:
        with self._changed:
            if isinstance(error, Aborted):  # a consequence: the cause is in the group already
                self._group.cancel()
            else:
                self._group.fail(error)
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait for at most this many seconds. Return whether all tasks are done or the group is cancelled."""
        with self._changed:
            if self._left and not self._group.cancelled:
                self._changed.wait(seconds)
            return self._left == 0 or self._group.cancelled

    def stop(self) -> None:
        """End the threads after their current tasks."""
        self.lane.stop()
        self.lane.join()
