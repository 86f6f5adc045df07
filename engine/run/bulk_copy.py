"""Tensors that are only copied: a plan's transfers are performed beside the lanes, and journaled once durable."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import DiskSpaceError
from ...io.output.clone import BLOCK, CopyStats, SharingRefused, refuses_to_share
from ...io.output.digests import BlockDigests
from ...io.output.group_commit import Aborted, GroupCommit
from ...io.reading import FileStamps, Reader
from ...io.sizes import format_size
from ..execute.executor import NOTIFY_SECONDS
from ..execute.tasks import LaneTime
from ..graph.graph import MergeGraph
from .transfers import BUFFER_BYTES, Transfer, WorkerPool, source_of

if TYPE_CHECKING:
    from ...io.output.directory import OutputDirectory


_SMALLEST_PIECE = 64 << 10


class BulkCopier:
    """Performs transfers on threads of their own, from the moment it is made.

    Args:
        transfers: what to move.
        out: where to.
        commits: the group commits that journal what was moved.
        threads: how many move.
        failed: called with what goes wrong.

    Attributes:
        moved: how, so far.
    """

    def __init__(
        self,
        transfers: Sequence[Transfer],
        out: OutputDirectory,
        commits: GroupCommit,
        threads: int,
        failed: Callable[[BaseException], None],
    ) -> None:
        self.moved = CopyStats()
        self._out = out
        self._commits = commits
        self._report = failed
        self._lock = threading.Lock()
        self._buffers = [memoryview(b"")] * threads
        self._unshared: dict[Path, int] = {}  # source -> bytes that are still to be shared
        self._refusing: set[Path] = set()
        for transfer in transfers:
            if transfer.shares:
                self._unshared[transfer.file] = self._unshared.get(transfer.file, 0) + transfer.shared
        self._mover = WorkerPool(transfers, threads, self._move, self._failed)

    def wait(self, watch: Callable[[], None]) -> None:
        """Wait until all is moved, or something went wrong; meanwhile, call `watch` now and then."""
        while not self._mover.wait(NOTIFY_SECONDS):
            watch()

    def stop(self) -> None:
        """End the threads once they have done what they are at."""
        self._mover.stop()

    def time(self) -> LaneTime | None:
        """What the threads did; None where there was nothing to do."""
        lane = self._mover.lane
        if not lane.tasks:
            return None
        waited = lane.seconds_waited(time.perf_counter())
        return LaneTime(len(lane.worked), lane.seconds_worked, waited, tuple(lane.levels))

    def _failed(self, error: BaseException) -> None:
        if not isinstance(error, Aborted):  # whatever ended the commits is reported already
            self._report(error)

    def _move(self, thread: int, transfer: Transfer) -> None:
        """Perform a transfer, and journal it. Raises Ended."""
        if not self._buffers[thread]:
            self._buffers[thread] = memoryview(bytearray(BUFFER_BYTES))
        if transfer.shares:
            apart = transfer.nbytes - transfer.shared
            try:
                self._receive(thread, transfer, transfer.target, transfer.nbytes, apart)
                return
            except SharingRefused as refused:
                self._refused(transfer.file, refused)
        for start, end in _pieces(transfer.target, transfer.nbytes, self._commits.piece):
            self._receive(thread, replace(transfer, shares=False), start, end - start, end - start)
        if transfer.shares:
            with self._lock:
                self._unshared[transfer.file] -= transfer.shared

    def _receive(self, thread: int, transfer: Transfer, start: int, nbytes: int, most: int) -> None:
        """Make a part of a transfer's target; at most so many bytes are written for it. Raises SharingRefused."""
        offset = transfer.offset + start - transfer.target
        with self._commits.writing(most):
            moved = self._out.receive(
                transfer.shard, start, transfer.file, offset, nbytes, self._buffers[thread], share=transfer.shares
            )
        with self._lock:
            self.moved.add(moved)
            if transfer.shares:
                self._unshared[transfer.file] -= moved.shared
        record = {"copied": [transfer.shard, start, start + nbytes]}
        self._commits.add({transfer.shard}, most, [record], moved.written)

    def _refused(self, file: Path, refused: SharingRefused) -> None:
        """A source's blocks are not shared, against the plan. Raises DiskSpaceError where there is no room to copy.

        The other sources are asked, too: it is better to stop now than when the disk is full.
        """
        with self._lock:
            self.moved.add(CopyStats(refused={refused.number: refused.nbytes}))
            if file in self._refusing:
                return
            others = self._unshared.keys() - self._refusing - {file}
            self._refusing |= {file} | {each for each in others if refuses_to_share(each, self._out.work)}
            needed = sum(self._unshared[each] for each in self._refusing)
        free = shutil.disk_usage(self._out.path).free
        if free < needed:
            raise DiskSpaceError(
                f"{self._out.path}: the file system refuses to share blocks with {file}, so that "
                f"{format_size(needed, up=True)} have to be copied, and {format_size(free)} are free: make room and "
                "run the same command again"
            )


def _pieces(target: int, nbytes: int, most: int) -> Iterator[tuple[int, int]]:
    """A range of a shard in pieces of at most `most` bytes that begin where blocks do, so that these can be shared."""
    step = max(_SMALLEST_PIECE, most // BLOCK * BLOCK)
    cuts = [target, *range((target // step + 1) * step, target + nbytes, step), target + nbytes]
    return pairwise(cuts)


def digests_of_sources(
    graph: MergeGraph,
    nodes: Collection[int],
    threads: int,
    stamps: FileStamps,
    count: Callable[[int], None],
    watch: Callable[[], None],
) -> dict[int, list[bytes]]:
    """The digests of the blocks of copying nodes, by reading their sources: what their copies ought to hold.

    Args:
        graph: what is made.
        nodes: which.
        threads: how many read.
        stamps: what the source files must be.
        count: called with bytes read, from one thread at a time.
        watch: called now and then, from this thread; what it raises ends it.

    Raises:
        MergeloomError: where a source can't be read.
    """
    found: dict[int, list[bytes]] = {}
    broken: list[BaseException] = []
    buffers = [memoryview(bytearray(BUFFER_BYTES)) for _ in range(threads)]
    reader = Reader(keep_cached=False, stamps=stamps)
    lock = threading.Lock()

    def work(thread: int, node: int) -> None:
        ref = graph.reads[graph.node_sources[node][0]]
        digests = BlockDigests(ref.nbytes)
        done = 0
        while done < ref.nbytes:
            if broken:
                return
            view = buffers[thread][: ref.nbytes - done]
            reader.read(ref.file, ref.offset + done, view)
            digests.feed(done, view)
            done += len(view)
            with lock:
                count(len(view))
        found[node] = digests.blocks

    def place(node: int) -> tuple[Path, int]:
        return source_of(graph, node), graph.reads[graph.node_sources[node][0]].offset

    mover = WorkerPool(sorted(nodes, key=place), threads, work, broken.append)
    try:
        while not mover.wait(NOTIFY_SECONDS):
            watch()
    finally:
        broken.append(KeyboardInterrupt())  # whoever still works stops
        mover.stop()
        reader.close()
    if len(broken) > 1:
        raise broken[0]
    return found
