"""Recovers an unfinished merge: checks what its journal says against the shards on the disk.

Every byte that is kept is checked: blocks against their digests in the journal, copies against their sources. Ranges
whose disk blocks are to be shared with a source are shared again instead, which takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ....errors import MergeloomError
from ....io.output.digests import BLOCK_BYTES, BlockDigests, bytes_digest
from ....io.output.journal import JournalContent
from ...graph.graph import Kind, MergeGraph
from ...graph.layout import Layout
from ..transfers import PART_BYTES, Transfer, source_of
from .checks import Check, Checked, Read, run_checks
from .source_digests import SourceRange

_BLOCKS_OF_A_CHECK = 8
_DIGEST_BYTES = 16

Range = tuple[int, int]


@dataclass(slots=True)
class RecoveredState:
    """What needs not be made again.

    Args:
        whole: the digests of the blocks of each node that is whole and came through the process.
        begun: nodes of which the first bytes are written, with these digested.
        copied: ranges of shards that were copied beside the lanes, by shard, in ascending order and apart.
        sources: the ranges of source tensors that it was made from, by read number, with their digests.
        checked: bytes of the shards that were checked.
        bytes_read: bytes that were read for it, of shards and sources.
        damaged: number of blocks that differ from their digests.
        differing: bytes of copies that differ from their sources.
    """

    whole: dict[int, list[bytes]] = field(default_factory=dict)
    begun: dict[int, BlockDigests] = field(default_factory=dict)
    copied: dict[int, list[Range]] = field(default_factory=dict)
    sources: dict[int, list[SourceRange]] = field(default_factory=dict)
    checked: int = 0
    bytes_read: int = 0
    damaged: int = 0
    differing: int = 0

    def written(self, graph: MergeGraph) -> dict[int, int]:
        """For each node that the lanes have written or begun the number of its bytes that are durable."""
        begun = {node: digests.position for node, digests in self.begun.items()}
        return begun | {node: graph.nbytes(node) for node in self.whole}

    def done(self, graph: MergeGraph, layout: Layout) -> dict[int, int]:
        """For each node that is whole or begun, how many of its bytes are durable."""
        done = self.written(graph)
        destinations = graph.destinations() if self.copied else []
        for node, places in enumerate(destinations):
            if node not in self.whole and graph.operation(node).kind is Kind.COPY and graph.nbytes(node):
                ranges = ((layout.shard_of[output], layout.offset_of[output]) for output in places)
                if all(self._has_copy(shard, start, start + graph.nbytes(node)) for shard, start in ranges):
                    done[node] = graph.nbytes(node)
        return done

    def _has_copy(self, shard: int, start: int, end: int) -> bool:
        return any(low <= start and end <= high for low, high in self.copied.get(shard, ()))

    def uncopied(self, transfers: Iterable[Transfer]) -> list[Transfer]:
        """What is left of these transfers."""
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
    """What a journal says of one node."""

    blocks: dict[int, bytes] = field(default_factory=dict)
    tail: tuple[int, int, bytes] = (0, 0, b"")  # the block's number, bytes of it, their digest

    @property
    def contiguous(self) -> int:
        """How many of the node's first blocks the journal has without a gap."""
        number = 0
        while number in self.blocks:
            number += 1
        return number


def recover(
    found: JournalContent | None,
    graph: MergeGraph,
    layout: Layout,
    shard_path: Callable[[int], Path],
    *,
    sharing: Collection[Path] = (),
    threads: int = 2,
    watch: Callable[[Checked], None] = lambda checked: None,
) -> RecoveredState:
    """What earlier runs have left that can be built on, all of it checked.

    Args:
        found: the journal; None for a new merge.
        graph: what is made: the same as then.
        layout: where it lies.
        shard_path: where each shard is.
        sharing: source files whose disk blocks are to be shared: copies of these are made again.
        threads: number of threads that read.
        watch: called now and then; what it raises ends it.

    Raises:
        MergeloomError: a source file of a copy can't be read.
    """
    if found is None:
        return RecoveredState()
    claims = _claims(found, graph)
    blocks = _block_checks(claims, graph, layout, shard_path)
    copies = _copy_checks(_copied(found, layout), graph, layout, shard_path, sharing)
    checked = run_checks([*blocks, *copies], threads, watch)
    durable = RecoveredState(checked=checked.nbytes, bytes_read=checked.bytes_read)
    damaged = {(check.node, number) for check in blocks for number in check.damaged}
    tails: dict[int, BlockDigests] = {check.node: check.tail for check in blocks if check.tail is not None}
    durable.damaged = len(damaged)
    for node, claim in claims.items():
        intact = next((number for number in range(claim.contiguous) if (node, number) in damaged), claim.contiguous)
        known = [claim.blocks[number] for number in range(intact)]
        if intact == _count(graph.nbytes(node)):
            durable.whole[node] = known
        elif node in tails and (node, claim.tail[0]) not in damaged and claim.tail[0] == intact:
            durable.begun[node] = tails[node]
        elif known:
            durable.begun[node] = BlockDigests(graph.nbytes(node), known)
    ranges: dict[int, list[Range]] = {}
    for copy in copies:
        ranges.setdefault(copy.shard, []).extend(copy.equal)
        durable.differing += copy.nbytes - sum(end - start for start, end in copy.equal)
    durable.copied = {shard: merged for shard, equal in ranges.items() if (merged := _united(equal))}
    return durable


# ------------------------------------------------------------------------------------------------ blocks


@dataclass(slots=True, eq=False)
class _BlockCheck(Check):
    """Compares some blocks of a node, in one of its places, with their digests.

    Args:
        node: the node's number.
        file: the shard.
        offset: offset of the node's first byte in the shard.
        size: bytes of the node.
        first: number of the first block.
        digests: of the blocks.
        known: for a check of the block that an earlier run had begun: the digests of all blocks before it.
        tail_bytes: how many bytes of it are durable.
        tail_digest: the digest of these.
        damaged: numbers of the blocks that differ.
        tail: the digests of the node up to the end of its durable bytes.
    """

    node: int
    file: Path
    offset: int
    size: int
    first: int
    digests: list[bytes]
    known: list[bytes] = field(default_factory=list)
    tail_bytes: int = 0
    tail_digest: bytes = b""
    damaged: list[int] = field(default_factory=list)
    tail: BlockDigests | None = None

    @property
    def nbytes(self) -> int:
        if self.tail_bytes:
            return self.tail_bytes
        return min(len(self.digests) * BLOCK_BYTES, self.size - self.first * BLOCK_BYTES)

    def run(self, read: Read) -> None:
        if self.tail_bytes:
            digests, start = BlockDigests(self.size, self.known), self.first * BLOCK_BYTES
            if self._feed(read, digests, start, self.tail_bytes, start) and digests.tail() == self.tail_digest:
                self.tail = digests
            else:
                self.damaged.append(self.first)
            return
        for number, expected in enumerate(self.digests, self.first):
            start = number * BLOCK_BYTES
            nbytes = min(BLOCK_BYTES, self.size - start)
            digests = BlockDigests(nbytes)
            if not self._feed(read, digests, start, nbytes, 0) or digests.blocks != [expected]:
                self.damaged.append(number)

    def _feed(self, read: Read, digests: BlockDigests, start: int, nbytes: int, position: int) -> bool:
        """Digest a range of the node; whether it could be read."""
        try:
            for data in read(self.file, self.offset + start, nbytes):
                digests.feed(position, data)
                position += len(data)
        except MergeloomError:
            return False
        return True


def _block_checks(
    claims: Mapping[int, _JournaledBlocks], graph: MergeGraph, layout: Layout, shard_path: Callable[[int], Path]
) -> list[_BlockCheck]:
    """Checks of all blocks that a journal names, in the order in which they lie in the shards."""
    checks: list[_BlockCheck] = []
    destinations = graph.destinations()
    for node, claim in claims.items():
        known = [claim.blocks[number] for number in range(claim.contiguous)]
        number, nbytes, digest = claim.tail
        size = graph.nbytes(node)
        for output in destinations[node]:
            file, offset = shard_path(layout.shard_of[output]), layout.offset_of[output]
            for first in range(0, len(known), _BLOCKS_OF_A_CHECK):
                part = known[first : first + _BLOCKS_OF_A_CHECK]
                checks.append(_BlockCheck(node, file, offset, size, first, part))
            if nbytes and number == len(known):
                checks.append(_BlockCheck(node, file, offset, size, number, [], known, nbytes, digest))
    return sorted(checks, key=lambda check: (check.file, check.offset, check.first))


# ------------------------------------------------------------------------------------------------ copies


@dataclass(slots=True, eq=False)
class _CopyCheck(Check):
    """Compares a range of a shard with the range of the source file that it is a copy of.

    Args:
        source: the source file.
        offset: offset of the range in it.
        shard: the shard's number.
        file: the shard.
        target: offset of the range in it.
        length: size of the range in bytes.
        equal: parts of the range that are equal, as offsets in the shard.
    """

    source: Path
    offset: int
    shard: int
    file: Path
    target: int
    length: int
    equal: list[Range] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.length

    def run(self, read: Read) -> None:
        position = self.target
        wanted = read(self.source, self.offset, self.length)
        for expected, data in zip(wanted, _or_empty(read(self.file, self.target, self.length)), strict=False):
            if bytes_digest(data) == bytes_digest(expected):  # faster than comparing memoryviews, and without the GIL
                self.equal.append((position, position + len(expected)))
            position += len(expected)


def _or_empty(parts: Iterator[memoryview]) -> Iterator[memoryview]:
    """The parts of a range; nothing more from the first one on that can't be read."""
    try:
        yield from parts
    except MergeloomError:
        return


def _copy_checks(
    copied: Mapping[int, list[Range]],
    graph: MergeGraph,
    layout: Layout,
    shard_path: Callable[[int], Path],
    sharing: Collection[Path],
) -> list[_CopyCheck]:
    """Checks of all ranges that a journal says were copied, but for those that are to be shared again."""
    checks = []
    for shard, ranges in copied.items():
        for output in layout.shards[shard].outputs:
            node = graph.outputs[output].node
            if graph.operation(node).kind is not Kind.COPY or source_of(graph, node) in sharing:
                continue
            ref = graph.reads[graph.node_sources[node][0]]
            first = layout.offset_of[output]
            for low, high in ranges:
                start, end = max(low, first), min(high, first + ref.nbytes)
                for part in range(start, end, PART_BYTES):
                    offset, nbytes = ref.offset + part - first, min(PART_BYTES, end - part)
                    checks.append(_CopyCheck(ref.file, offset, shard, shard_path(shard), part, nbytes))
    return sorted(checks, key=lambda check: (check.source, check.offset))


def _count(nbytes: int) -> int:
    """How many blocks a tensor has."""
    return -(-nbytes // BLOCK_BYTES)


def _claims(found: JournalContent, graph: MergeGraph) -> dict[int, _JournaledBlocks]:
    """What a journal says of each node."""
    claims: dict[int, _JournaledBlocks] = {}
    for record in found.records:
        node, first = record.get("node"), record.get("first")
        if not (isinstance(node, int) and isinstance(first, int) and 0 <= node < len(graph.node_sources)):
            continue
        count, nbytes = _count(graph.nbytes(node)), graph.nbytes(node)
        claim = claims.setdefault(node, _JournaledBlocks())
        for number, digest in enumerate(_digests(record.get("blocks")), first):
            if 0 <= number < count:
                claim.blocks[number] = digest
        number = first + len(_listed(record.get("blocks")))
        size, digest = _tail(record.get("tail"))
        if 0 < size < min(BLOCK_BYTES, nbytes - number * BLOCK_BYTES):
            claim.tail = max(claim.tail, (number, size, digest))
    return claims


def _copied(found: JournalContent, layout: Layout) -> dict[int, list[Range]]:
    """The ranges of each shard that a journal says were copied, those put together that touch."""
    ranges: dict[int, list[Range]] = {}
    for record in found.records:
        given = _listed(record.get("copied"))
        if len(given) == 3 and all(isinstance(value, int) for value in given) and 0 <= given[0] < len(layout.shards):
            ranges.setdefault(given[0], []).append((given[1], given[2]))
    return {shard: _united(unsorted) for shard, unsorted in ranges.items()}


def _united(ranges: Iterable[Range]) -> list[Range]:
    """Ranges in ascending order, those joined that touch."""
    united: list[Range] = []
    for low, high in sorted(ranges):
        if united and low <= united[-1][1]:
            united[-1] = (united[-1][0], max(united[-1][1], high))
        else:
            united.append((low, high))
    return united


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _digests(value: Any) -> Iterator[bytes]:
    """Digests in hexadecimal, up to one that is none."""
    for text in _listed(value):
        digest = _digest(text)
        if digest is None:
            return
        yield digest


def _digest(text: Any) -> bytes | None:
    try:
        digest = bytes.fromhex(text)
    except (TypeError, ValueError):
        return None
    return digest if len(digest) == _DIGEST_BYTES else None


def _tail(value: Any) -> tuple[int, bytes]:
    """Bytes of a block and their digest; 0 where there are none."""
    given = _listed(value)
    digest = _digest(given[1]) if len(given) == 2 else None
    return (given[0], digest) if digest is not None and isinstance(given[0], int) else (0, b"")
