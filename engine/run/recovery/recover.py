"""Recovers an interrupted merge: checks the journal against the shards on disk.

Every byte that is kept is checked: blocks against their digests in the journal, copies against their sources. Ranges
that the plan reflinks are reflinked again instead, which takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ....errors import MergeloomError
from ....io.counters import IoCounters
from ....io.output.digests import BLOCK_BYTES, BlockDigests, bytes_digest
from ....io.output.journal import JournalContent
from ...execute.survival import Prefix
from ...graph.graph import MergeGraph
from ...graph.layout import Layout
from ..buffers import ThreadBuffers
from ..transfers import PART_BYTES, Transfer, source_of
from .checks import CHECKS, Check, Read, Watch, run_checks
from .records import (
    BlocksWritten,
    JournalRecord,
    RangeCopied,
    SourceRange,
    SourceRead,
    SumsWritten,
    block_count,
    parse_records,
)
from .recovered_sums import covered_sums
from .source_digests import add_ranges, ranges_in_use, used_bytes

_BLOCKS_PER_CHECK = 8

_NO_TAIL = (0, 0, b"")

Range = tuple[int, int]


@dataclass(slots=True)
class RecoveredState:
    """Data of earlier runs that need not be made again.

    Args:
        complete: block digests of each complete node that the lanes have written.
        partial: digests of the first bytes of each node of which only these are written.
        copied: ranges of each shard that were bulk-copied, in ascending order and disjoint.
        sources: source ranges that the data was made from, with their digests, by read number.
        survival: sums over the first elements of nodes, all of which are intact.
        damaged: number of blocks that differ from their digests.
        differing: number of copied bytes that differ from their sources.
    """

    complete: dict[int, list[bytes]] = field(default_factory=dict)
    partial: dict[int, BlockDigests] = field(default_factory=dict)
    copied: dict[int, list[Range]] = field(default_factory=dict)
    sources: dict[int, list[SourceRange]] = field(default_factory=dict)
    survival: dict[int, Prefix] = field(default_factory=dict)
    damaged: int = 0
    differing: int = 0

    def written(self, graph: MergeGraph) -> dict[int, int]:
        """Return the number of durable bytes of each node that the lanes have written completely or in part."""
        partial = {node: digests.position for node, digests in self.partial.items()}
        return partial | {node: graph.nbytes(node) for node in self.complete}

    def done(self, graph: MergeGraph, layout: Layout) -> dict[int, int]:
        """Return the number of durable bytes of each node that is written or copied, completely or in part."""
        done = self.written(graph)
        destinations = graph.destinations() if self.copied else []
        for node, outputs in enumerate(destinations):
            if node not in self.complete and graph.operation(node).copies_tensor and graph.nbytes(node):
                starts = ((layout.shard_of[output], layout.offset_of[output]) for output in outputs)
                if all(self._has_copy(shard, start, start + graph.nbytes(node)) for shard, start in starts):
                    done[node] = graph.nbytes(node)
        return done

    def _has_copy(self, shard: int, start: int, end: int) -> bool:
        return any(low <= start and end <= high for low, high in self.copied.get(shard, ()))

    def uncopied(self, transfers: Iterable[Transfer]) -> list[Transfer]:
        """Return the parts of transfers that are not copied yet."""
        left = []
        for transfer in transfers:
            position, end = transfer.target, transfer.target + transfer.nbytes
            for low, high in [*self.copied.get(transfer.shard, ()), (end, end)]:
                if low > position and position < end:
                    left.append(_part(transfer, position, min(low, end)))
                position = max(position, high)
        return left


def _part(transfer: Transfer, start: int, end: int) -> Transfer:
    offset = transfer.offset + start - transfer.target
    return replace(transfer, offset=offset, target=start, nbytes=end - start)


@dataclass(slots=True)
class _JournaledBlocks:
    """The blocks of one node that the journal names as durable.

    Args:
        blocks: digests of the node's first blocks, up to the first one that the journal does not have.
        tail: number of the incomplete block, its durable bytes, and their digest.
        beyond: digests of blocks after a gap, by number; None if there are none.
    """

    blocks: list[bytes] = field(default_factory=list)
    tail: tuple[int, int, bytes] = _NO_TAIL
    beyond: dict[int, bytes] | None = None

    def add(self, record: BlocksWritten) -> None:
        """Add the blocks of a record; a later record of a block replaces an earlier one."""
        beyond = self.beyond or {}
        for number, digest in enumerate(record.blocks, record.first):
            if number < len(self.blocks):
                self.blocks[number] = digest
            else:
                beyond[number] = digest
        while (following := beyond.pop(len(self.blocks), None)) is not None:
            self.blocks.append(following)
        self.beyond = beyond or None
        if record.tail is not None:
            self.tail = max(self.tail, (record.end, record.tail.nbytes, record.tail.digest))


@dataclass(slots=True)
class _Journaled:
    """Everything that the records of a journal name.

    Args:
        blocks: blocks of each node.
        copied: copied ranges of each shard.
        sources: digested ranges of each read.
        sums: sums over the first elements of each node.
    """

    blocks: dict[int, _JournaledBlocks] = field(default_factory=dict)
    copied: dict[int, list[Range]] = field(default_factory=dict)
    sources: dict[int, list[SourceRange]] = field(default_factory=dict)
    sums: dict[int, list[Prefix]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[JournalRecord]) -> _Journaled:
        """Collect what records name. They are not kept."""
        found = cls()
        for record in records:
            match record:
                case BlocksWritten(node):
                    found.blocks.setdefault(node, _JournaledBlocks()).add(record)
                case SumsWritten(node, prefix):
                    found.sums.setdefault(node, []).append(prefix)
                case RangeCopied(shard, start, end):
                    found.copied.setdefault(shard, []).append((start, end))
                case SourceRead():
                    add_ranges(found.sources, record)
        return found


def recover(
    journal: JournalContent | None,
    graph: MergeGraph,
    layout: Layout,
    shard_path: Callable[[int], Path],
    *,
    sharing: Collection[Path] = (),
    buffers: ThreadBuffers | None = None,
    counters: IoCounters | None = None,
    watch: Watch = lambda checked, total: None,
) -> RecoveredState:
    """Check all data that a journal names as durable, and return what is intact.

    Args:
        journal: content of the journal; None for a new merge.
        graph: merge graph, the same as in the earlier runs.
        layout: layout of the output.
        shard_path: function that returns the path of a shard.
        sharing: source files that are reflinked; tensors of these files are reflinked again.
        buffers: buffers of the threads that read, two for each; two threads' if None.
        counters: counters of the bytes that are read to check them; new ones if None.
        watch: function that is called at intervals; if it raises, the checks end.

    Raises:
        MergeloomError: a source file of a copy can't be read.
    """
    if journal is None:
        return RecoveredState()
    journaled = _Journaled.of(parse_records(journal.records, graph, layout))
    blocks = _block_checks(journaled.blocks, graph, layout, shard_path)
    copied = {shard: _merge_ranges(ranges) for shard, ranges in journaled.copied.items()}
    copies = _copy_checks(copied, graph, layout, shard_path, sharing)
    run_checks([*blocks, *copies], buffers or ThreadBuffers(CHECKS, 2), counters or IoCounters(), watch)
    state = RecoveredState()
    damaged = {(check.node, number) for check in blocks for number in check.damaged}
    tails: dict[int, BlockDigests] = {check.node: check.tail for check in blocks if check.tail is not None}
    state.damaged = len(damaged)
    for node, entry in journaled.blocks.items():
        contiguous = len(entry.blocks)
        intact = next((number for number in range(contiguous) if (node, number) in damaged), contiguous)
        known = entry.blocks[:intact] if intact < contiguous else entry.blocks
        if intact == block_count(graph, node):
            state.complete[node] = known
        elif node in tails and (node, entry.tail[0]) not in damaged and entry.tail[0] == intact:
            state.partial[node] = tails[node]
        elif known:
            state.partial[node] = BlockDigests(graph.nbytes(node), known)
    ranges: dict[int, list[Range]] = {}
    for copy in copies:
        ranges.setdefault(copy.shard, []).extend(copy.equal)
        state.differing += copy.length - sum(end - start for start, end in copy.equal)
    state.copied = {shard: merged for shard, equal in ranges.items() if (merged := _merge_ranges(equal))}
    written = state.written(graph)
    state.sources = ranges_in_use(graph, journaled.sources, used_bytes(graph, written))
    state.survival = covered_sums(journaled.sums, graph, written)
    return state


# ------------------------------------------------------------------------------------------------ blocks


@dataclass(slots=True, eq=False)
class _BlockCheck(Check):
    """Compares some blocks of a node, in one of its destinations, with their digests.

    A check of an incomplete block has no `digests`, but `known`, `tail_bytes` and `tail_digest`.

    Args:
        node: number of the node.
        file: shard.
        offset: offset of the node's output in the shard.
        size: size of the node's output in bytes.
        first: number of the first block.
        digests: expected digests of the blocks.
        known: digests of all blocks before the incomplete one.
        tail_bytes: number of durable bytes of the incomplete block.
        tail_digest: expected digest of these bytes.
        damaged: result: numbers of the blocks that differ.
        tail: result: digests of the node up to its last durable byte, if the incomplete block is intact.
    """

    node: int
    file: Path
    offset: int
    size: int
    first: int
    digests: Sequence[bytes]
    known: Sequence[bytes] = ()
    tail_bytes: int = 0
    tail_digest: bytes = b""
    damaged: tuple[int, ...] = ()
    tail: BlockDigests | None = None

    @property
    def bytes_to_read(self) -> int:
        if self.tail_bytes:
            return self.tail_bytes
        return min(len(self.digests) * BLOCK_BYTES, self.size - self.first * BLOCK_BYTES)

    def run(self, read: Read) -> None:
        if self.tail_bytes:
            digests, start = BlockDigests(self.size, self.known), self.first * BLOCK_BYTES
            if self._feed(read, digests, start, self.tail_bytes, start) and digests.tail() == self.tail_digest:
                self.tail = digests
            else:
                self.damaged = (self.first,)
            return
        for number, expected in enumerate(self.digests, self.first):
            start = number * BLOCK_BYTES
            nbytes = min(BLOCK_BYTES, self.size - start)
            digests = BlockDigests(nbytes)
            if not self._feed(read, digests, start, nbytes, 0) or digests.blocks != [expected]:
                self.damaged = (*self.damaged, number)

    def _feed(self, read: Read, digests: BlockDigests, start: int, nbytes: int, position: int) -> bool:
        """Digest a range of the node's output. Return whether it could be read."""
        try:
            for data in read(self.file, self.offset + start, nbytes):
                digests.feed(position, data)
                position += len(data)
        except MergeloomError:
            return False
        return True


def _block_checks(
    journaled: Mapping[int, _JournaledBlocks], graph: MergeGraph, layout: Layout, shard_path: Callable[[int], Path]
) -> list[_BlockCheck]:
    """Create the checks of all blocks that the journal names, in the order of shards and offsets."""
    checks: list[_BlockCheck] = []
    destinations = graph.destinations()
    files = [shard_path(shard) for shard in range(len(layout.shards))]
    for node, entry in journaled.items():
        known = entry.blocks
        number, nbytes, digest = entry.tail
        size = graph.nbytes(node)
        for output in destinations[node]:
            file, offset = files[layout.shard_of[output]], layout.offset_of[output]
            for first in range(0, len(known), _BLOCKS_PER_CHECK):
                part = known[first : first + _BLOCKS_PER_CHECK]
                checks.append(_BlockCheck(node, file, offset, size, first, part))
            if nbytes and number == len(known):
                checks.append(_BlockCheck(node, file, offset, size, number, (), known, nbytes, digest))
    return sorted(checks, key=lambda check: (check.file, check.offset, check.first))


# ------------------------------------------------------------------------------------------------ copies


@dataclass(slots=True, eq=False)
class _CopyCheck(Check):
    """Compares a range of a shard with the range of the source file that it is a copy of.

    Args:
        source: source file.
        offset: offset of the range in the source file.
        shard: number of the shard.
        file: shard.
        target: offset of the range in the shard.
        length: size of the range in bytes.
        equal: result: parts of the range that are equal, as offsets in the shard.
    """

    source: Path
    offset: int
    shard: int
    file: Path
    target: int
    length: int
    equal: list[Range] = field(default_factory=list)

    @property
    def bytes_to_read(self) -> int:
        return 2 * self.length

    def run(self, read: Read) -> None:
        position = self.target
        source = read(self.source, self.offset, self.length)
        for expected, data in zip(source, _until_error(read(self.file, self.target, self.length)), strict=False):
            if bytes_digest(data) == bytes_digest(expected):  # faster than comparing memoryviews, and without the GIL
                self.equal.append((position, position + len(expected)))
            position += len(expected)


def _until_error(chunks: Iterator[memoryview]) -> Iterator[memoryview]:
    """Yield the chunks of a range up to the first one that can't be read."""
    try:
        yield from chunks
    except MergeloomError:
        return


def _copy_checks(
    copied: Mapping[int, list[Range]],
    graph: MergeGraph,
    layout: Layout,
    shard_path: Callable[[int], Path],
    sharing: Collection[Path],
) -> list[_CopyCheck]:
    """Create the checks of all copied ranges, except for those that are reflinked again."""
    checks = []
    for shard, ranges in copied.items():
        for output in layout.shards[shard].outputs:
            node = graph.outputs[output].node
            if not graph.operation(node).copies_tensor or source_of(graph, node) in sharing:
                continue
            ref = graph.reads[graph.node_sources[node][0]]
            first = layout.offset_of[output]
            for low, high in ranges:
                start, end = max(low, first), min(high, first + ref.nbytes)
                for part in range(start, end, PART_BYTES):
                    offset, nbytes = ref.offset + part - first, min(PART_BYTES, end - part)
                    checks.append(_CopyCheck(ref.file, offset, shard, shard_path(shard), part, nbytes))
    return sorted(checks, key=lambda check: (check.source, check.offset))


def _merge_ranges(ranges: Iterable[Range]) -> list[Range]:
    """Sort ranges, and merge those that touch."""
    merged: list[Range] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged
