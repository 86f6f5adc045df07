"""Digests the source bytes that a merge uses, to find out whether a source file has changed between two runs.

Each chunk that the lanes read is digested once. The journal takes the digests before it names any output that was made
from these bytes. If a file's stamp has changed when the merge is resumed, the same chunks are read again and compared.
Bytes that no durable output was made from may differ.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import xxhash

from ....errors import CheckpointError
from ....io.counters import IoCounters
from ....io.tensors.assembled import AssembledRef, files_of, stored_parts, stored_ranges
from ....io.tensors.refs import TensorRef
from ...graph.graph import Kind, MergeGraph
from ..buffers import ThreadBuffers
from .checks import Check, Read, Watch, run_checks
from .records import SourceRange, SourceRead

_MODULUS = 1 << 128

Ranges = Mapping[int, Sequence[SourceRange]]
"""Digested ranges by read number."""


class SourceDigests:
    """Collects digests of the bytes that the lanes read. Thread-safe.

    Args:
        graph: merge graph.
        known: ranges that the journal already has; they are not digested again.
    """

    def __init__(self, graph: MergeGraph, known: Ranges | None = None) -> None:
        self._lock = threading.Lock()
        self._reads = _Reads(graph)
        self._pending: dict[int, list[SourceRange]] = {}
        self._prefix = array("q", bytes(8 * len(graph.reads)))  # by read: all bytes before this offset are digested
        self._islands: dict[int, list[tuple[int, int]]] = {}  # by read: digested ranges beyond the prefix
        for read, ranges in (known or {}).items():
            for known_range in ranges:
                self._cover(read, known_range.start, known_range.end)

    def add(self, file: Path, offset: int, data: memoryview) -> None:
        """Digest a chunk of a source file, unless it is already digested.

        Args:
            file: source file.
            offset: offset of the chunk in the file.
            data: bytes of the chunk, which belong to one tensor.
        """
        if not data:
            return
        for read, start in self._reads.at(file, offset, len(data)):
            end = start + len(data)
            with self._lock:
                if self._covers(read, start, end):
                    continue
            digest = xxhash.xxh3_128_intdigest(data, seed=start)
            with self._lock:
                if not self._covers(read, start, end):
                    self._cover(read, start, end)
                    _insert(self._pending.setdefault(read, []), SourceRange(start, end, len(data), digest))

    def take(self) -> list[SourceRead]:
        """Return journal records of the ranges that were digested since the last call."""
        with self._lock:
            pending, self._pending = self._pending, {}
        return list(source_records(pending))

    def _covers(self, read: int, start: int, end: int) -> bool:
        if end <= self._prefix[read]:
            return True
        islands = self._islands.get(read, [])
        before = bisect_right(islands, start, key=itemgetter(0))
        return before > 0 and end <= islands[before - 1][1]

    def _cover(self, read: int, start: int, end: int) -> None:
        islands = self._islands.setdefault(read, [])
        first = bisect_left(islands, start, key=itemgetter(1))  # the islands that the range touches become one with it
        last = bisect_right(islands, end, key=itemgetter(0))
        touched = islands[first:last]
        islands[first:last] = [(min([start, *(low for low, _ in touched)]), max([end, *(high for _, high in touched)]))]
        while islands and islands[0][0] <= self._prefix[read]:
            self._prefix[read] = max(self._prefix[read], islands.pop(0)[1])
        if not islands:
            del self._islands[read]


@dataclass(frozen=True, slots=True)
class SharedPart:
    """A part of a tensor whose bytes are inside a part of another tensor, with which their digests are kept.

    Args:
        start: offset of the part in its tensor.
        nbytes: size of the part.
        owner: number of the other read.
        owner_start: offset of the part's bytes in the other tensor.
    """

    start: int
    nbytes: int
    owner: int
    owner_start: int


class _Columns:
    """Parts of tensors in one file: the number of the read, the start in its tensor, and offset and end in the file."""

    def __init__(self) -> None:
        self.numbers, self.starts, self.offsets, self.ends = (array("q") for _ in range(4))

    def add(self, number: int, start: int, offset: int, end: int) -> None:
        """Add a part."""
        self.numbers.append(number)
        self.starts.append(start)
        self.offsets.append(offset)
        self.ends.append(end)

    def in_order(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield the parts by offset, of equal ones the longest first."""
        order = sorted(range(len(self.ends)), key=lambda place: -self.ends[place])
        order.sort(key=self.offsets.__getitem__)
        for place in order:
            yield self.numbers[place], self.starts[place], self.offsets[place], self.ends[place]


class _Reads:
    """An index of the reads by file and offset. Of tensors that share bytes, only those inside no other one count.

    Attributes:
        shared: the parts of reads that are inside others, by number of the read.
    """

    def __init__(self, graph: MergeGraph) -> None:
        self.shared: dict[int, list[SharedPart]] = {}
        self._columns: dict[Path, _Columns] = {}
        parts: dict[Path, _Columns] = {}
        for number, ref in enumerate(graph.reads):
            start = 0
            for part in stored_parts(ref) if ref.nbytes else ():
                parts.setdefault(part.file, _Columns()).add(number, start, part.offset, part.offset + part.nbytes)
                start += part.nbytes
        for file, unsorted in parts.items():
            kept = self._columns[file] = _Columns()
            for number, start, offset, end in unsorted.in_order():
                if kept.ends and end <= kept.ends[-1]:
                    owner_start = kept.starts[-1] + offset - kept.offsets[-1]
                    inside = SharedPart(start, end - offset, kept.numbers[-1], owner_start)
                    self.shared.setdefault(number, []).append(inside)
                else:
                    kept.add(number, start, offset, end)

    def at(self, file: Path, offset: int, nbytes: int) -> list[tuple[int, int]]:
        """Return the reads that a range of a file is in, each with the range's offset in its tensor."""
        parts = self._columns[file]
        found = []
        place = bisect_right(parts.offsets, offset) - 1
        while place >= 0 and parts.ends[place] >= offset + nbytes:
            found.append((parts.numbers[place], parts.starts[place] + offset - parts.offsets[place]))
            place -= 1
        return found


def shared_parts(graph: MergeGraph) -> dict[int, list[SharedPart]]:
    """Return the parts of reads whose bytes are inside those of other reads, by number of the read."""
    return _Reads(graph).shared


def _insert(ranges: list[SourceRange], added: SourceRange) -> None:
    """Insert a range into a sorted list, and join it with its neighbors if possible."""
    index = bisect_right(ranges, added.start, key=lambda each: each.start)
    ranges.insert(index, added)
    for first in (index, index - 1):
        if 0 <= first < len(ranges) - 1 and ranges[first].joins(ranges[first + 1]):
            following = ranges.pop(first + 1)
            before = ranges[first]
            digest = (before.digest + following.digest) % _MODULUS
            ranges[first] = SourceRange(before.start, following.end, before.chunk, digest)


# ------------------------------------------------------------------------------------------------ the journal


def source_records(ranges: Ranges) -> Iterator[SourceRead]:
    """Return ranges as journal records."""
    for read, digested in sorted(ranges.items()):
        yield SourceRead(read, tuple(digested))


def add_ranges(ranges: dict[int, list[SourceRange]], record: SourceRead) -> None:
    """Add the ranges of a journal record to those of its read."""
    ranges.setdefault(record.read, []).extend(record.ranges)


# ------------------------------------------------------------------------------------------------ resuming


def used_bytes(graph: MergeGraph, done: Mapping[int, int]) -> dict[int, int]:
    """Return for each read the number of its first bytes that durable output was made from.

    Args:
        graph: merge graph.
        done: number of durable bytes of each node that the lanes have written, completely or in part.
    """
    used: dict[int, int] = {}
    for node, position in done.items():
        operation = graph.operation(node)
        direct = all(value >= 0 for value in graph.node_sources[node]) and not graph.access_numbers(node)
        for read in graph.reads_of(node) if position else ():
            ref = graph.reads[read]
            if isinstance(ref, AssembledRef) and ref.interleaved:
                needed = ref.nbytes  # the first bytes in stored order are not those of the tensor
            elif operation.kind is not Kind.MERGE and direct:
                needed = position
            elif operation.kernel is None or operation.passes > 1 or not direct:
                needed = ref.nbytes  # reductions read the complete tensor before the first byte is written
            else:
                alignment = operation.kernel.alignment
                elements = -(-position * 8 // graph.node_dtype[node].bits)
                needed = ref.dtype.nbytes(-(-elements // alignment) * alignment)
            used[read] = max(used.get(read, 0), min(needed, ref.nbytes))
    return used


def ranges_in_use(graph: MergeGraph, ranges: Ranges, used: Mapping[int, int]) -> dict[int, list[SourceRange]]:
    """Return the ranges with at least one used byte, in the tensor itself or in one that shares its bytes."""
    ends = dict(used)
    for read, parts in shared_parts(graph).items():
        for part in parts:
            if used.get(read, 0) > part.start:
                end = part.owner_start + min(part.nbytes, used[read] - part.start)
                ends[part.owner] = max(ends.get(part.owner, 0), end)
    kept = {read: [each for each in ranges.get(read, ()) if each.start < end] for read, end in ends.items()}
    return {read: in_use for read, in_use in kept.items() if in_use}


def check_sources(
    graph: MergeGraph,
    files: Collection[Path],
    ranges: Ranges,
    used: Mapping[int, int],
    buffers: ThreadBuffers,
    counters: IoCounters,
    watch: Watch,
) -> int:
    """Compare the used bytes of source files with their digests.

    Args:
        graph: merge graph.
        files: source files whose stamps have changed.
        ranges: ranges with at least one used byte, as the journal has them.
        used: number of the first bytes of each read that were used.
        buffers: buffers of the threads that read.
        counters: counters of the bytes that are read to check them.
        watch: function that is called at intervals; if it raises, the comparison ends.

    Returns:
        The number of bytes that were compared.

    Raises:
        CheckpointError: a file's used bytes have changed, or the journal has no digest of them.
    """
    checks: list[_RangeCheck] = []
    known: dict[Path, list[tuple[int, int]]] = {}
    for read, digested in ranges.items():
        ref = graph.reads[read]
        file = next((file for file in files_of(ref) if file in files), None)
        if file is not None:
            checks += [_RangeCheck(file, ref, graph.read_names[read], each) for each in digested]
            for each in digested:
                for part in stored_ranges(ref, each.start, each.end):
                    known.setdefault(part.file, []).append((part.offset, part.offset + part.nbytes))
    for read, end in used.items():
        for part in stored_ranges(graph.reads[read], 0, end):
            within = part.file not in files or _all_within(
                part.offset, part.offset + part.nbytes, known.get(part.file, [])
            )
            if not within:
                raise source_changed(part.file, f"the journal has no digest of tensor {graph.read_names[read]}")
    checks.sort(key=lambda check: (check.ref.file, check.ref.offset, check.range.start))
    return run_checks(checks, buffers, counters, watch)


def _all_within(start: int, end: int, ranges: Sequence[tuple[int, int]]) -> bool:
    for low, high in sorted(ranges):
        if low > start:
            break
        start = max(start, high)
    return start >= end


@dataclass(frozen=True, slots=True)
class _RangeCheck(Check):
    """Compares a range of a source tensor with its digest."""

    file: Path  # the changed file, which holds the tensor or one of its parts
    ref: TensorRef
    name: str
    range: SourceRange

    @property
    def bytes_to_read(self) -> int:
        return self.range.end - self.range.start

    def run(self, read: Read) -> None:
        digest = 0
        for start in range(self.range.start, self.range.end, self.range.chunk):
            chunk = xxhash.xxh3_128(seed=start)
            for part in stored_ranges(self.ref, start, min(start + self.range.chunk, self.range.end)):
                for data in read(*part):
                    chunk.update(data)
            digest += chunk.intdigest()
        if digest % _MODULUS != self.range.digest:
            raise source_changed(self.file, f"tensor {self.name} differs from what was read before")


def source_changed(file: Path, reason: str) -> CheckpointError:
    """Return the error for a source file whose used bytes have changed since the merge began."""
    return CheckpointError(
        f"{file} was changed since the merge began: {reason}, and the output would mix two versions of the file. Put "
        "the file back and run the same command again, or start over with --restart"
    )
