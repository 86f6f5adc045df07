"""The executor's sink: output tensors become ranges of shards, digested on the way, and journaled once durable."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...io.output.digests import BLOCK_BYTES, BlockDigests
from ...io.output.group_commit import GROUP_BYTES, Aborted, GroupCommit, Record
from ...io.output.journal import Journal
from .recovery.recover import RecoveredState
from .recovery.source_digests import SourceDigests, source_records

if TYPE_CHECKING:
    from ...io.output.directory import OutputDirectory
    from .plan import Plan

_WAIT_SECONDS = 0.5
_SMALLEST_PIECE = 64 << 10


class _Tensor:
    """One node's output on its way."""

    __slots__ = ("begun", "blocks", "digests", "fed", "position", "tails", "written")

    def __init__(self, digests: BlockDigests) -> None:
        self.digests = digests
        self.fed = threading.Condition()
        self.begun = digests.position  # bytes that an earlier run has written
        self.position = self.begun  # all bytes before it are in all their places
        self.blocks = len(digests.blocks)  # that records have been made of
        self.written: dict[int, int] = {}  # ranges beyond it that are in all their places: first byte -> end
        self.tails: dict[int, bytes] = {}  # the digest of the last, unfinished block up to where a piece ended


class ShardWriter:
    """Writes a plan's output tensors to their places.

    Args:
        plan: what is made.
        out: where.
        journal: to which what is durable is added.
        durable: what is so already.
        check: called before anything is added to the journal; raises where a source isn't what it was.
        failed: called with what goes wrong when data is written or committed.
        group_bytes: the most bytes that are written and not yet durable.
        sources: digests of what was read so far, which the journal takes before the records of what was made from it.
    """

    def __init__(
        self,
        plan: Plan,
        out: OutputDirectory,
        journal: Journal,
        durable: RecoveredState,
        check: Callable[[], None],
        failed: Callable[[BaseException], None],
        group_bytes: int = GROUP_BYTES,
        sources: SourceDigests | None = None,
    ) -> None:
        self._sources = sources
        self._graph = plan.built.graph
        self._layout = plan.layout
        self._destinations = self._graph.destinations()
        self._out = out
        self._journal = journal
        self._check = check
        self._lock = threading.Lock()
        self._tensors = {node: _Tensor(digests) for node, digests in durable.begun.items()}
        self._failed = failed
        self._stopped = False
        self.commits = GroupCommit(out.sync, self._append, failed, group_bytes=group_bytes)
        self.digests: dict[int, list[bytes]] = dict(durable.whole)
        """The digests of the blocks of every node that is whole and came through the process."""

    # --- from the lanes ----------------------------------------------------------------------------------------

    def write(self, node: int, offset: int, data: memoryview) -> None:
        """Put a piece of a node's output in all its places. Pieces begin in order, and may overlap in time.

        Raises:
            Ended: where the merge is being stopped, or another piece could not be written.
        """
        try:
            self._write(node, offset, data)
        except BaseException as error:
            if not isinstance(error, Aborted):
                self._failed(error)
            self._stopped = True  # no piece after it will ever be in turn
            raise

    def _write(self, node: int, offset: int, data: memoryview) -> None:
        tensor = self._tensor(node)
        skip = min(max(0, tensor.begun - offset), len(data))
        offset, data = offset + skip, data[skip:]
        places = [
            (self._layout.shard_of[output], self._layout.offset_of[output]) for output in self._destinations[node]
        ]
        shards = {shard for shard, _ in places}
        step = max(_SMALLEST_PIECE, self.commits.piece // len(places))
        for start in range(0, len(data), step):
            piece = data[start : start + step]
            self._feed(tensor, offset + start, piece)
            with self.commits.writing(len(piece) * len(places)):
                for shard, place in places:
                    self._out.write(shard, place + offset + start, piece)
            with tensor.fed:
                record = progress_record(node, tensor, offset + start, len(piece))
            self.commits.add(shards, len(piece) * len(places), [record] if record else [], len(piece) * len(places))

    def _tensor(self, node: int) -> _Tensor:
        with self._lock:
            found = self._tensors.get(node)
            if found is None:
                found = self._tensors[node] = _Tensor(BlockDigests(self._graph.nbytes(node)))
            return found

    def _feed(self, tensor: _Tensor, offset: int, piece: memoryview) -> None:
        """Digest a piece, once all before it has been."""
        with tensor.fed:
            while not tensor.digests.reached(offset):
                if self._stopped:
                    raise Aborted
                tensor.fed.wait(_WAIT_SECONDS)
            tensor.digests.feed(offset, piece)
            if tail := tensor.digests.tail():
                tensor.tails[offset + len(piece)] = tail
            tensor.fed.notify_all()

    def finished(self, node: int) -> None:
        """Keep the digests of a node that is whole."""
        tensor = self._tensor(node)
        if tensor.position != tensor.digests.nbytes:
            raise RuntimeError(f"node {node}: {tensor.position} of {tensor.digests.nbytes} bytes were written")
        with self._lock:
            self.digests[node] = tensor.digests.blocks
            del self._tensors[node]

    # --- the journal -------------------------------------------------------------------------------------------

    def _append(self, records: Collection[Record]) -> None:
        """Add records to the journal, those of one node as one, behind the digests of what they were made from."""
        self._check()
        used = self._sources.take() if self._sources is not None else []
        self._journal.append([*used, *coalesce_records(records)])

    def stop(self) -> None:
        """Begin no other commit, and let nobody wait any more."""
        self._stopped = True
        self.commits.stop()

    def abandon(self) -> bool:
        """End without another commit; see `GroupCommit.abandon`."""
        self.stop()
        return self.commits.abandon()


def progress_record(node: int, tensor: _Tensor, start: int, nbytes: int) -> dict[str, Any] | None:
    """The record of how far a node has come now that this range is in all its places; None where no further."""
    tensor.written[start] = start + nbytes
    before = tensor.position
    while (end := tensor.written.pop(tensor.position, None)) is not None:
        tensor.position = end
    if tensor.position == before:
        return None
    whole = tensor.position >= tensor.digests.nbytes
    first, blocks = tensor.blocks, len(tensor.digests.blocks) if whole else tensor.position // BLOCK_BYTES
    tensor.blocks = blocks
    tail = tensor.tails.get(tensor.position)
    for end in [end for end in tensor.tails if end <= tensor.position]:
        del tensor.tails[end]
    record = {"node": node, "first": first, "blocks": [block.hex() for block in tensor.digests.blocks[first:blocks]]}
    return {**record, "tail": [tensor.position % BLOCK_BYTES, tail.hex()]} if tail else record


def coalesce_records(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Records with those that go on with one another put together."""
    nodes: dict[int, dict[str, Any]] = {}
    joined: list[dict[str, Any]] = []
    for record in records:
        last = nodes.get(record.get("node", -1))
        if last is not None and record["first"] == last["first"] + len(last["blocks"]):
            last["blocks"] += record["blocks"]
            last.pop("tail", None)
            last.update({"tail": record["tail"]} if "tail" in record else {})
            continue
        joined.append(dict(record))
        if "node" in record:
            nodes[record["node"]] = joined[-1]
    return joined


def records_of(durable: RecoveredState) -> Iterator[Mapping[str, Any]]:
    """What is durable, as the first records of a journal."""
    yield from source_records(durable.sources)
    for node, blocks in durable.whole.items():
        yield {"node": node, "first": 0, "blocks": [block.hex() for block in blocks]}
    for node, digests in durable.begun.items():
        record = {"node": node, "first": 0, "blocks": [block.hex() for block in digests.blocks]}
        tail = digests.tail()
        yield {**record, "tail": [digests.position % BLOCK_BYTES, tail.hex()]} if tail else record
    for shard, ranges in sorted(durable.copied.items()):
        for start, end in ranges:
            yield {"copied": [shard, start, end]}
