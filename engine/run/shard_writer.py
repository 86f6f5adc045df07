"""Writes output tensors to the shards: digests each chunk, syncs in groups, and journals what is durable."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ...io.output.digests import BLOCK_BYTES, BlockDigests
from ...io.output.group_commit import GROUP_BYTES, Aborted, GroupCommit
from ...io.output.journal import Journal
from ...io.task_group import TaskGroup
from .recovery.records import BlocksWritten, JournalRecord, RangeCopied, SumsWritten, Tail
from .recovery.recover import RecoveredState
from .recovery.source_digests import SourceDigests, source_records

if TYPE_CHECKING:
    from ...io.output.directory import OutputDirectory
    from ..execute.survival import SurvivalSums
    from .plan import Plan

_MIN_CHUNK_BYTES = 64 << 10


class _Tensor:
    """The state of one node's output while it is being written."""

    __slots__ = ("blocks", "digested", "digests", "position", "recovered", "tails", "written")

    def __init__(self, digests: BlockDigests) -> None:
        self.digests = digests
        self.digested = threading.Condition()
        self.recovered = digests.position  # bytes that an earlier run has written
        self.position = self.recovered  # all bytes before it are in all destinations
        self.blocks = len(digests.blocks)  # number of blocks that have a record
        self.written: dict[int, int] = {}  # ranges beyond `position` that are in all destinations: start -> end
        self.tails: dict[int, bytes] = {}  # end of a chunk -> digest of the incomplete block that ends there


class ShardWriter:
    """Writes a plan's output tensors to all their destinations. It is the executor's sink.

    Args:
        plan: plan of the merge.
        out: output directory.
        journal: journal that receives a record of all durable data.
        recovered: data that earlier runs have made durable.
        check: function that is called before records are appended; it raises if a source file has changed.
        group: task group that gets the errors of writes and commits.
        group_bytes: maximum number of bytes that are written and not yet durable.
        sources: digests of the source bytes read so far; the journal takes them before the records of the output.
        survival: sums over outputs, which the journal takes after the records of their bytes.
    """

    def __init__(
        self,
        plan: Plan,
        out: OutputDirectory,
        journal: Journal,
        recovered: RecoveredState,
        check: Callable[[], None],
        group: TaskGroup,
        group_bytes: int = GROUP_BYTES,
        sources: SourceDigests | None = None,
        survival: SurvivalSums | None = None,
    ) -> None:
        self._survival = survival
        self._sources = sources
        self._graph = plan.built.graph
        self._layout = plan.layout
        self._destinations = self._graph.destinations()
        self._out = out
        self._journal = journal
        self._check = check
        self._lock = threading.Lock()
        self._tensors = {node: _Tensor(digests) for node, digests in recovered.partial.items()}
        self._group = group
        self._stopped = False
        self.commits: GroupCommit[JournalRecord] = GroupCommit(out.sync, self._append, group, group_bytes=group_bytes)
        self.digests: dict[int, list[bytes]] = dict(recovered.complete)
        """Block digests of every complete node that the lanes have written, in this run or an earlier one."""

    # --- called by the lanes -----------------------------------------------------------------------------------

    def write(self, node: int, offset: int, data: memoryview) -> None:
        """Write a chunk of a node's output to all destinations. Chunks start in order, and may overlap in time.

        Raises:
            Aborted: the merge is being stopped, or another chunk could not be written.
        """
        try:
            self._write(node, offset, data)
        except BaseException as error:
            if not isinstance(error, Aborted):
                self._group.fail(error)
            self._abort()  # the chunks after this one can never be digested
            raise

    def _abort(self) -> None:
        """Write nothing more, and wake the threads that wait for the digest of an earlier chunk."""
        self._stopped = True
        with self._lock:
            tensors = list(self._tensors.values())
        for tensor in tensors:
            with tensor.digested:
                tensor.digested.notify_all()

    def _write(self, node: int, offset: int, data: memoryview) -> None:
        tensor = self._tensor(node)
        skip = min(max(0, tensor.recovered - offset), len(data))
        offset, data = offset + skip, data[skip:]
        targets = [
            (self._layout.shard_of[output], self._layout.offset_of[output]) for output in self._destinations[node]
        ]
        shards = {shard for shard, _ in targets}
        step = max(_MIN_CHUNK_BYTES, self.commits.max_reservation // len(targets))
        for start in range(0, len(data), step):
            chunk = data[start : start + step]
            nbytes = len(chunk) * len(targets)
            self._digest(tensor, offset + start, chunk)
            with self.commits.writing(nbytes):
                for shard, first in targets:
                    self._out.write(shard, first + offset + start, chunk)
            with tensor.digested:
                record = progress_record(node, tensor, offset + start, len(chunk))
                sums = self._sums(node, tensor) if record else None
            self.commits.add(shards, nbytes, [each for each in (record, sums) if each], nbytes)

    def _sums(self, node: int, tensor: _Tensor) -> SumsWritten | None:
        """Return the record of the sums over what is written of a node, if there are new ones."""
        elements = tensor.position * 8 // self._graph.node_dtype[node].bits
        prefix = self._survival.durable(node, elements) if self._survival is not None else None
        return None if prefix is None else SumsWritten(node, prefix)

    def _tensor(self, node: int) -> _Tensor:
        with self._lock:
            tensor = self._tensors.get(node)
            if tensor is None:
                tensor = self._tensors[node] = _Tensor(BlockDigests(self._graph.nbytes(node)))
            return tensor

    def _digest(self, tensor: _Tensor, offset: int, chunk: memoryview) -> None:
        """Digest a chunk once all bytes before it are digested."""
        with tensor.digested:
            while not tensor.digests.reached(offset):
                if self._stopped:
                    raise Aborted
                tensor.digested.wait()
            tensor.digests.feed(offset, chunk)
            if tail := tensor.digests.tail():
                tensor.tails[offset + len(chunk)] = tail
            tensor.digested.notify_all()

    def finished(self, node: int) -> None:
        """Keep the digests of a complete node."""
        tensor = self._tensor(node)
        if tensor.position != tensor.digests.nbytes:
            raise RuntimeError(f"node {node}: {tensor.position} of {tensor.digests.nbytes} bytes were written")
        with self._lock:
            self.digests[node] = tensor.digests.blocks
            del self._tensors[node]

    # --- the journal -------------------------------------------------------------------------------------------

    def _append(self, records: Collection[JournalRecord]) -> None:
        """Append records to the journal, after the digests of the source bytes that the output was made from."""
        self._check()
        used = self._sources.take() if self._sources is not None else []
        self._journal.append(record.to_json() for record in (*used, *coalesce_records(records)))

    def stop(self) -> None:
        """Start no more commits, and wake all threads that wait for one."""
        self._abort()
        self.commits.stop()

    def abandon(self) -> bool:
        """Stop without another commit; see `GroupCommit.abandon`."""
        self.stop()
        return self.commits.abandon()


def progress_record(node: int, tensor: _Tensor, start: int, nbytes: int) -> BlocksWritten | None:
    """Note that a range of a node is in all destinations, and return the record of the progress, if there is any.

    Args:
        node: number of the node.
        tensor: state of the node's output.
        start: offset of the range in the output.
        nbytes: size of the range in bytes.
    """
    tensor.written[start] = start + nbytes
    before = tensor.position
    while (end := tensor.written.pop(tensor.position, None)) is not None:
        tensor.position = end
    if tensor.position == before:
        return None
    complete = tensor.position >= tensor.digests.nbytes
    first, blocks = tensor.blocks, len(tensor.digests.blocks) if complete else tensor.position // BLOCK_BYTES
    tensor.blocks = blocks
    tail = tensor.tails.get(tensor.position)
    for end in [end for end in tensor.tails if end <= tensor.position]:
        del tensor.tails[end]
    digests = tuple(tensor.digests.blocks[first:blocks])
    return BlocksWritten(node, first, digests, Tail(tensor.position % BLOCK_BYTES, tail) if tail else None)


def coalesce_records(records: Iterable[JournalRecord]) -> list[JournalRecord]:
    """Merge records of consecutive blocks of a node, and keep its last sums, which keeps the journal short."""
    newest: dict[int, int] = {}  # node -> index of its newest record
    merged: list[JournalRecord] = []
    sums: dict[int, SumsWritten] = {}  # after the records of the bytes
    for record in records:
        if isinstance(record, SumsWritten):
            sums[record.node] = record
            continue
        if isinstance(record, BlocksWritten):
            index = newest.get(record.node)
            before = merged[index] if index is not None else None
            if index is not None and isinstance(before, BlocksWritten) and record.first == before.end:
                merged[index] = replace(before, blocks=before.blocks + record.blocks, tail=record.tail)
                continue
            newest[record.node] = len(merged)
        merged.append(record)
    return [*merged, *sums.values()]


def records_of(recovered: RecoveredState) -> Iterator[JournalRecord]:
    """Return the records of recovered data: the first records of the journal that replaces the old one."""
    yield from source_records(recovered.sources)
    for node, blocks in recovered.complete.items():
        yield BlocksWritten(node, 0, tuple(blocks))
    for node, digests in recovered.partial.items():
        tail = digests.tail()
        last = Tail(digests.position % BLOCK_BYTES, tail) if tail else None
        yield BlocksWritten(node, 0, tuple(digests.blocks), last)
    for node, prefix in recovered.survival.items():
        yield SumsWritten(node, prefix)
    for shard, ranges in sorted(recovered.copied.items()):
        for start, end in ranges:
            yield RangeCopied(shard, start, end)
