"""The journal of an unfinished merge: an append-only log of the plan and of the durable parts of the output.

Each line is a record: the XXH3-64 of its JSON in hexadecimal, a space, and the JSON. The first incomplete line was
being written when the process or the machine stopped; it and all lines after it are ignored.

A process appends only to a journal that it created. A process that resumes a merge replaces the journal atomically with
a new one, which contains the old records that it has verified.

The first line contains the facts, which determine the output's bytes:

    format          version of the journal's format
    mergeloom       version of mergeloom
    arithmetic      version of its arithmetic
    layout          version of its layout
    recipe          text of the recipe
    outputs         digest of every output tensor's name, dtype, shape, operation and sources
    seed            seed for methods that sample
    shard_size      maximum size of a shard in bytes
    sources         identity of each source file: model number -> file name -> digest of its size, header and samples
    device          kind of device, where the bytes depend on it; otherwise absent
    methods         digests of the code of user-defined methods, if there are any
    stamps          state of each source file: model number -> file name -> [inode, size, mtime, ctime], in nanoseconds

All other lines are records, distinguished by their first key. Node, read and shard numbers are those of the plan, which
the facts determine; digests are XXH3-128 in hexadecimal.

    source, ranges  ranges of a source tensor (a read number) from which durable output was or is about to be computed:
                    [start, end, piece size, sum of the digests of the pieces], in bytes from the start of the tensor
    node, first, blocks, tail
                    digests of the durable blocks of an output (a node number), from block number `first` on; `tail` is
                    [bytes, digest] of the block behind them, where only its first bytes are durable
    copied          [shard number, start, end]: a durable range of a shard that was cloned or copied from a source
    publish         names of all files, which are renamed to their final names in OUT after this record

A `source` record precedes the records of output that was computed from it.
"""

from __future__ import annotations

import json
import os
import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import xxhash

from ..platform import create_file, rename, sync_data, sync_directory, write_at

FORMAT = 3
_LONGEST_LINE = 64 << 20
_PREFIX = 17
"""Number of bytes before the JSON of a line: its digest and a space."""
_PIECE_BYTES = 256 << 10
"""Lines are written in pieces of about this many bytes."""


class StoredRecords(Sequence[Mapping[str, Any]]):
    """The records of a journal as JSON text, about 100 bytes for each. One is parsed at a time, when it is asked for.

    A parsed record takes ten times as much memory, and the journal has one for each tensor that was read or written.
    """

    __slots__ = ("_ends", "_text")

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("Q")

    def append(self, content: bytes) -> None:
        """Append a record, a JSON object."""
        self._text += content
        self._ends.append(len(self._text))

    @property
    def nbytes(self) -> int:
        """Memory of the records in bytes."""
        return len(self._text) + len(self._ends) * self._ends.itemsize

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return map(self._parse, range(len(self._ends)))

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | list[Mapping[str, Any]]:
        numbers = range(len(self._ends))[index]
        return self._parse(numbers) if isinstance(numbers, int) else list(map(self._parse, numbers))

    def __eq__(self, other: object) -> bool:
        """Whether another sequence has equal records."""
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # it is mutable

    def _parse(self, number: int) -> Mapping[str, Any]:
        start = self._ends[number - 1] if number else 0
        record: Mapping[str, Any] = json.loads(self._text[start : self._ends[number]])
        return record


@dataclass(frozen=True, slots=True)
class JournalContent:
    """The content of a journal.

    Args:
        facts: the facts of the merge and the journal's ``format``; empty if the first line is damaged.
        records: the records, in the order in which they became durable.
    """

    facts: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]

    @property
    def readable(self) -> bool:
        """Whether the journal has the format that this version writes."""
        return self.facts.get("format") == FORMAT


class Journal:
    """A journal open for appending. Thread-safe.

    Args:
        path: the file. An existing journal is replaced atomically.
        facts: the facts of the merge.
        records: records to start with.

    Raises:
        OSError: writing failed; an existing journal is unchanged.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._lock = threading.Lock()
        self._end = 0
        self.records = 0
        """The number of records that were appended after those it started with."""
        temporary = path.with_name(f"{path.name}.new")
        self._descriptor = create_file(temporary)
        try:
            self.append([{**facts, "format": FORMAT}, *records])
            rename(temporary, path)
            sync_directory(path.parent)
        except BaseException:
            self.close()
            raise
        self.records = 0

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records and make them durable.

        After a failure the journal rejects further records, because it is unknown which bytes of the file are durable.

        Raises:
            OSError: writing failed.
            ValueError: the journal is closed, or an earlier call has failed.
        """
        with self._lock:
            if self._end < 0:
                raise ValueError("the journal is closed")
            end, self._end = self._end, -1
            count = 0
            for piece, lines in _pieces(records):
                write_at(self._descriptor, piece, end)
                end += len(piece)
                count += lines
            if count:
                sync_data(self._descriptor)
            self._end = end
            self.records += count

    def close(self) -> None:
        """Close the file. Calling it again has no effect."""
        with self._lock:
            self._end = -1
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1


def read_journal(path: Path) -> JournalContent | None:
    """Read a journal up to its first damaged line; None if it does not exist. Raises OSError if reading fails."""
    try:
        stream = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return None
    records = StoredRecords()
    with stream:
        facts = _decode(stream.readline(_LONGEST_LINE))
        if facts is None:
            return JournalContent({}, ())
        while _decode(line := stream.readline(_LONGEST_LINE)) is not None:
            records.append(line[_PREFIX:-1])
    return JournalContent(facts, records)


def _pieces(records: Iterable[Mapping[str, Any]]) -> Iterator[tuple[bytes, int]]:
    """Yield the lines of records in pieces, with the number of lines in each."""
    piece, lines = bytearray(), 0
    for record in records:
        piece += _encode(record)
        lines += 1
        if len(piece) >= _PIECE_BYTES:
            yield bytes(piece), lines
            piece.clear()
            lines = 0
    if lines:
        yield bytes(piece), lines


def _encode(record: Mapping[str, Any]) -> bytes:
    content = json.dumps(record, separators=(",", ":")).encode()
    return xxhash.xxh3_64_hexdigest(content).encode() + b" " + content + b"\n"


def _decode(line: bytes) -> Mapping[str, Any] | None:
    """The record in a line; None if the line is incomplete or damaged."""
    digest, _, content = line[:-1].partition(b" ")
    if not line.endswith(b"\n") or digest != xxhash.xxh3_64_hexdigest(content).encode():
        return None
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
