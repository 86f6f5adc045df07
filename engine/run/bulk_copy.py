"""Performs bulk copies: a plan's transfers run concurrently with the lanes, and are journaled once they are durable."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import DiskSpaceError
from ...io.counters import IoCounters
from ...io.output.clone import BLOCK, SharingRefused, refuses_to_share
from ...io.output.digests import BlockDigests
from ...io.output.group_commit import GroupCommit
from ...io.reading import FileStamps, Reader
from ...io.sizes import format_size
from ...io.task_group import TaskGroup
from ..execute.executor import NOTIFY_SECONDS
from ..execute.lanes import LaneTime
from ..graph.graph import MergeGraph
from .buffers import ThreadBuffers
from .recovery.records import JournalRecord, RangeCopied
from .transfers import Transfer, WorkerPool, source_of

if TYPE_CHECKING:
    from ...io.output.directory import OutputDirectory


_MIN_CHUNK_BYTES = 64 << 10


class BulkCopier:
    """Performs transfers in threads of its own, which start at once.

    Args:
        transfers: transfers to perform.
        out: output directory.
        commits: group commits that journal the transfers.
        buffers: buffers of the threads, one for each.
        group: task group that gets the errors.
        counters: counters of the bytes that are shared, or read and written.
    """

    def __init__(
        self,
        transfers: Sequence[Transfer],
        out: OutputDirectory,
        commits: GroupCommit[JournalRecord],
        buffers: ThreadBuffers,
        group: TaskGroup,
        counters: IoCounters,
    ) -> None:
        self._counters = counters
        self._out = out
        self._commits = commits
        self._lock = threading.Lock()
        self._buffers = buffers
        self._held = ExitStack()
        self._buffer_of: dict[int, memoryview] = {}  # by thread
        self._unshared: dict[Path, int] = {}  # source -> bytes that are still to be reflinked
        self._refusing: set[Path] = set()
        for transfer in transfers:
            if transfer.shares:
                self._unshared[transfer.file] = self._unshared.get(transfer.file, 0) + transfer.shared
        self._pool = WorkerPool(transfers, buffers.threads, self._transfer, group)

    def wait(self, watch: Callable[[], None]) -> None:
        """Wait until all transfers are done or the group is cancelled; meanwhile, call `watch` at intervals."""
        while not self._pool.wait(NOTIFY_SECONDS):
            watch()
        self.stop()

    def stop(self) -> None:
        """End the threads after their current transfers, and free their buffers."""
        self._pool.stop()
        self._buffer_of.clear()
        self._held.close()

    def time(self) -> LaneTime | None:
        """Return how long the threads worked and waited; None if there were no transfers."""
        lane = self._pool.lane
        if not lane.tasks:
            return None
        waited = lane.seconds_waited(time.perf_counter())
        return LaneTime(len(lane.worked), lane.seconds_worked, waited, tuple(lane.levels))

    def _transfer(self, thread: int, transfer: Transfer) -> None:
        """Perform a transfer, and journal it. Raises Aborted."""
        if thread not in self._buffer_of:
            with self._lock:
                self._buffer_of[thread] = self._held.enter_context(self._buffers.take(self._buffers.nbytes))
        if transfer.shares:
            try:
                unaligned = transfer.nbytes - transfer.shared
                self._receive(thread, transfer, transfer.target, transfer.nbytes, unaligned)
                return
            except SharingRefused as refused:
                self._refused(transfer.file, refused)
        for start, end in _chunks(transfer.target, transfer.nbytes, self._commits.max_reservation):
            self._receive(thread, replace(transfer, shares=False), start, end - start, end - start)
        if transfer.shares:
            with self._lock:
                self._unshared[transfer.file] -= transfer.shared

    def _receive(self, thread: int, transfer: Transfer, start: int, nbytes: int, max_written: int) -> None:
        """Perform a part of a transfer. Raises SharingRefused.

        Args:
            thread: number of the thread, which has a buffer.
            transfer: the transfer.
            start: offset of the part in the shard.
            nbytes: size of the part in bytes.
            max_written: maximum number of bytes that are written for it rather than reflinked.
        """
        offset = transfer.offset + start - transfer.target
        with self._commits.writing(max_written):
            stats = self._out.receive(
                transfer.shard, start, transfer.file, offset, nbytes, self._buffer_of[thread], share=transfer.shares
            )
        self._counters.add(read=stats.written, written=stats.written, shared=stats.shared)
        if transfer.shares:
            with self._lock:
                self._unshared[transfer.file] -= stats.shared
        record = RangeCopied(transfer.shard, start, start + nbytes)
        self._commits.add({transfer.shard}, max_written, [record], stats.written)

    def _refused(self, file: Path, refused: SharingRefused) -> None:
        """Note that a source can't be reflinked, contrary to the plan. Raises DiskSpaceError if it can't be copied.

        The other sources are tried too: stopping now is better than stopping when the disk is full.
        """
        self._counters.add_refused(refused.number, refused.nbytes)
        with self._lock:
            if file in self._refusing:
                return
            others = self._unshared.keys() - self._refusing - {file}
            self._refusing |= {file} | {each for each in others if refuses_to_share(each, self._out.work)}
            needed = sum(self._unshared[each] for each in self._refusing)
        free = shutil.disk_usage(self._out.path).free
        if free < needed:
            raise DiskSpaceError(
                f"{self._out.path}: the file system refuses to share blocks with {file}, so "
                f"{format_size(needed, up=True)} have to be copied, and only {format_size(free)} are free: make room "
                "and run the same command again"
            )


def _chunks(target: int, nbytes: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Split a range of a shard into chunks of at most `max_bytes`, at block boundaries, so their blocks can be shared.

    Args:
        target: offset of the range in the shard.
        nbytes: size of the range in bytes.
        max_bytes: maximum size of a chunk in bytes.
    """
    step = max(_MIN_CHUNK_BYTES, max_bytes // BLOCK * BLOCK)
    cuts = [target, *range((target // step + 1) * step, target + nbytes, step), target + nbytes]
    return pairwise(cuts)


def digests_of_sources(
    graph: MergeGraph,
    nodes: Collection[int],
    buffers: ThreadBuffers,
    stamps: FileStamps,
    counters: IoCounters,
    watch: Callable[[], None],
) -> dict[int, list[bytes]]:
    """Digest the sources of copying nodes: their copies in OUT must have the same digests.

    Args:
        graph: merge graph.
        nodes: numbers of the copying nodes.
        buffers: buffers of the threads that read, one for each.
        stamps: expected stamps of the source files.
        counters: counters of the bytes that are read.
        watch: function that is called at intervals from this thread; if it raises, the reading ends.

    Returns:
        The block digests of each node.

    Raises:
        MergeloomError: a source can't be read.
    """
    blocks: dict[int, list[bytes]] = {}
    reader = Reader(keep_cached=False, stamps=stamps)
    group = TaskGroup("digest")

    def work(thread: int, node: int) -> None:
        ref = graph.reads[graph.node_sources[node][0]]
        digests = BlockDigests(ref.nbytes)
        position = 0
        with buffers.take(ref.nbytes) as buffer:
            while position < ref.nbytes:
                if group.cancelled:
                    return
                view = buffer[: ref.nbytes - position]
                reader.read(ref.file, ref.offset + position, view)
                digests.feed(position, view)
                position += len(view)
                counters.add(read=len(view))
        blocks[node] = digests.blocks

    def file_position(node: int) -> tuple[Path, int]:
        return source_of(graph, node), graph.reads[graph.node_sources[node][0]].offset

    pool = WorkerPool(sorted(nodes, key=file_position), buffers.threads, work, group)
    try:
        while not pool.wait(NOTIFY_SECONDS):
            watch()
    finally:
        group.cancel()
        pool.stop()
        reader.close()
    group.check()
    return blocks
