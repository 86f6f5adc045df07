"""The records of the journal: what each one promises, and how it is stored.

Two parties use the journal. The *writer* appends records while the merge runs. The *reader* is a later run of the same
merge, after the first one was interrupted at any point, a power failure included.

What the writer does, in this order:

1. It writes output bytes to the shards: the lanes write computed tensors, bulk copies clone or copy source ranges.
2. It syncs these shards (``fdatasync``).
3. It checks that no source file has changed since the run began. A changed file ends the run, and nothing is appended.
4. It appends the records of these bytes, `SourceRead` records first, and syncs the journal.

Steps 2 to 4 are one group commit. The writer repeats them until all output is durable. Then it writes and syncs the
other files, appends `Publishing`, and renames the files into OUT. The manifest is the last file to be renamed.

What the reader may assume after each record:

`SourceRead`
    Output that later records name may have been made from these source bytes, and they had this digest. If the source
    file has changed since, these bytes must still have the digest; otherwise the merge cannot be resumed.
`BlocksWritten`
    These blocks of an output are durable in every shard that holds the output, and have these digests. Records of
    one output may overlap and come in any order of blocks; a block counts once all blocks before it are recorded.
`SumsWritten`
    These are the sums over the first elements of an output, see `engine.execute.survival`. `BlocksWritten` records
    before it name the bytes of these elements; if one of them is damaged, the sums are not used either.
`RangeCopied`
    This range of a shard is durable and equals its source range.
`Publishing`
    All output is durable. Any of the named files may already have its final name. The reader moves those back first.

A crash loses at most the group that was not yet committed: its bytes may be in the shards, but no record names them.
The reader does not rely on the disk: it compares every range that it keeps with its digest or its source.

`parse_records` is the only place that decides what a damaged or unknown record means: the record is ignored. This is
safe, because a missing record only causes bytes to be made again.

On disk a record is a JSON object; its first key determines its type (`mergeloom.io.output.journal` has the keys and the
framing of lines). Digests are XXH3-128 in hexadecimal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite, nan
from typing import Any, TypeGuard

from ....io.output.digests import BLOCK_BYTES
from ....io.output.publishing import Publishing
from ....methods.kernel.reduction.survival import SUMS
from ...execute.survival import Prefix, block_elements, has_sums
from ...graph.graph import MergeGraph
from ...graph.layout import Layout

__all__ = [
    "BlocksWritten",
    "JournalRecord",
    "Publishing",
    "RangeCopied",
    "SourceRange",
    "SourceRead",
    "SumsWritten",
    "Tail",
    "block_count",
    "parse_records",
]

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class SourceRange:
    """A range of a source tensor that was read.

    Args:
        start: offset of the first byte in the tensor.
        end: offset of the byte after the last one.
        chunk: size in bytes of the chunks that were digested; the last one may be shorter.
        digest: the sum of the XXH3-128 of all chunks, each seeded with its own offset, modulo 2**128. A sum does not
            depend on the order in which the lanes read the chunks.
    """

    start: int
    end: int
    chunk: int
    digest: int

    def joins(self, following: SourceRange) -> bool:
        """Whether the range and the following one can be written as one range."""
        same = following.chunk == self.chunk
        last = following.end - following.start == following.chunk < self.chunk
        return self.end == following.start and (self.end - self.start) % self.chunk == 0 and (same or last)


@dataclass(frozen=True, slots=True)
class SourceRead:
    """Ranges of a source tensor that durable output was made from.

    Args:
        read: number of the read in the graph.
        ranges: the ranges, with their digests.
    """

    read: int
    ranges: tuple[SourceRange, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the record as the journal stores it."""
        return {"source": self.read, "ranges": [[r.start, r.end, r.chunk, f"{r.digest:032x}"] for r in self.ranges]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> SourceRead | None:
        """Parse a record. Return None if it is of another type or malformed. Malformed ranges are dropped."""
        read, ranges = record.get("source"), record.get("ranges")
        if not (_is_number(read) and isinstance(ranges, list)):
            return None
        parsed = (_source_range(entry) for entry in ranges)
        return cls(read, tuple(each for each in parsed if each is not None))


@dataclass(frozen=True, slots=True)
class Tail:
    """The durable first bytes of a block that is not complete.

    Args:
        nbytes: number of durable bytes.
        digest: digest of these bytes.
    """

    nbytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class BlocksWritten:
    """Durable blocks of an output.

    Args:
        node: number of the node that makes the output.
        first: number of the first block.
        blocks: digests of the blocks.
        tail: durable part of the block after them; None if it has no durable bytes.
    """

    node: int
    first: int
    blocks: tuple[bytes, ...]
    tail: Tail | None = None

    @property
    def end(self) -> int:
        """Number of the block after the last one, which is the block of the tail."""
        return self.first + len(self.blocks)

    def to_json(self) -> dict[str, Any]:
        """Return the record as the journal stores it."""
        record = {"node": self.node, "first": self.first, "blocks": [block.hex() for block in self.blocks]}
        return record if self.tail is None else record | {"tail": [self.tail.nbytes, self.tail.digest.hex()]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> BlocksWritten | None:
        """Parse a record. Return None if it is of another type or malformed."""
        node, first, blocks, tail = (record.get(key) for key in ("node", "first", "blocks", "tail"))
        if not (_is_number(node) and _is_number(first) and isinstance(blocks, list)):
            return None
        digests = [_digest(text) for text in blocks]
        if tail is None:
            last = None
        elif isinstance(tail, list) and len(tail) == 2 and _is_number(tail[0]) and (digest := _digest(tail[1])):
            last = Tail(tail[0], digest)
        else:
            return None
        known = tuple(digest for digest in digests if digest is not None)
        return cls(node, first, known, last) if len(known) == len(digests) else None


@dataclass(frozen=True, slots=True)
class SumsWritten:
    """Sums over the first elements of an output, all of which are durable.

    Args:
        node: number of the node that makes the output.
        prefix: number of elements, and the sums. The journal has null instead of a sum that is not finite.
    """

    node: int
    prefix: Prefix

    def to_json(self) -> dict[str, Any]:
        """Return the record as the journal stores it."""
        sums = [[part if isfinite(part) else None for part in parts] for parts in self.prefix.sums]
        return {"sums": self.node, "elements": self.prefix.elements, "values": sums}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> SumsWritten | None:
        """Parse a record. Return None if it is of another type or malformed."""
        node, elements, values = (record.get(key) for key in ("sums", "elements", "values"))
        if not (_is_number(node) and _is_number(elements) and isinstance(values, list) and len(values) == SUMS):
            return None
        if not all(isinstance(parts, list) and all(map(_is_sum, parts)) for parts in values):
            return None
        sums = tuple(tuple(nan if part is None else float(part) for part in parts) for parts in values)
        return cls(node, Prefix(elements, sums))


@dataclass(frozen=True, slots=True)
class RangeCopied:
    """A durable range of a shard that was cloned or copied from a source.

    Args:
        shard: number of the shard.
        start: offset of the first byte in the shard.
        end: offset of the byte after the last one.
    """

    shard: int
    start: int
    end: int

    def to_json(self) -> dict[str, Any]:
        """Return the record as the journal stores it."""
        return {"copied": [self.shard, self.start, self.end]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> RangeCopied | None:
        """Parse a record. Return None if it is of another type or malformed."""
        numbers = record.get("copied")
        if not (isinstance(numbers, list) and len(numbers) == 3 and all(map(_is_number, numbers))):
            return None
        return cls(*numbers)


JournalRecord = SourceRead | BlocksWritten | SumsWritten | RangeCopied | Publishing

_PARSERS: Mapping[str, Callable[[Mapping[str, Any]], JournalRecord | None]] = {
    "source": SourceRead.from_json,
    "node": BlocksWritten.from_json,
    "sums": SumsWritten.from_json,
    "copied": RangeCopied.from_json,
    "publish": Publishing.from_json,
}


def parse_records(records: Iterable[Mapping[str, Any]], graph: MergeGraph, layout: Layout) -> Iterator[JournalRecord]:
    """Parse the records of a journal one by one. Those that are unknown, malformed or do not fit the plan are ignored.

    Args:
        records: records as the journal stores them.
        graph: merge graph, whose nodes and reads the records number.
        layout: layout of the output, whose shards the records number.
    """
    for stored in records:
        parse = _PARSERS.get(next(iter(stored), ""))
        record = parse(stored) if parse is not None else None
        if record is not None and (fitting := _fit(record, graph, layout)) is not None:
            yield fitting


def _fit(record: JournalRecord, graph: MergeGraph, layout: Layout) -> JournalRecord | None:
    """The record, without source ranges that exceed their tensor; None if a number in it does not exist in the plan."""
    match record:
        case SourceRead(read, ranges):
            if not 0 <= read < len(graph.reads):
                return None
            nbytes = graph.reads[read].nbytes
            fitting = tuple(r for r in ranges if 0 <= r.start < r.end <= nbytes and 0 < r.chunk <= r.end - r.start)
            return replace(record, ranges=fitting)
        case BlocksWritten(node, first, _, tail):
            if not (0 <= node < len(graph.node_sources) and first >= 0 and record.end <= block_count(graph, node)):
                return None
            left = graph.nbytes(node) - record.end * BLOCK_BYTES
            return record if tail is None or 0 < tail.nbytes < min(BLOCK_BYTES, left) else None
        case SumsWritten(node, prefix):
            if not (0 <= node < len(graph.node_sources) and has_sums(graph, node)):
                return None
            block, total = block_elements(graph, node), graph.elements(node)
            ends = 0 < prefix.elements <= total and (prefix.elements == total or prefix.elements % block == 0)
            return record if ends else None
        case RangeCopied(shard, start, end):
            exists = 0 <= shard < len(layout.shards) and 0 <= start <= end <= layout.shards[shard].nbytes
            return record if exists else None
        case Publishing():
            return record


def block_count(graph: MergeGraph, node: int) -> int:
    """Number of digested blocks of a node's output."""
    return -(-graph.nbytes(node) // BLOCK_BYTES)


def _is_number(value: Any) -> TypeGuard[int]:
    return type(value) is int  # a bool is an int, but not in JSON


def _is_sum(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and isfinite(value))


def _digest(text: Any) -> bytes | None:
    """A digest from its hexadecimal form; None if it is malformed."""
    try:
        digest = bytes.fromhex(text)
    except (TypeError, ValueError):
        return None
    return digest if len(digest) == _DIGEST_BYTES else None


def _source_range(entry: Any) -> SourceRange | None:
    if not (isinstance(entry, list) and [type(value) for value in entry] == [int, int, int, str]):
        return None
    start, end, chunk, text = entry
    digest = _digest(text)
    return None if digest is None else SourceRange(start, end, chunk, int.from_bytes(digest))
