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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ..platform import create_file, rename, sync_data, sync_directory, write_at

FORMAT = 3
_LONGEST_LINE = 64 << 20


@dataclass(frozen=True, slots=True)
class JournalContent:
    """The content of a journal.

    Args:
        facts: the facts of the merge and the journal's ``format``; empty if the first line is damaged.
        records: the records, in the order in which they became durable.
    """

    facts: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]

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
        lines = [_encode(record) for record in records]
        if not lines:
            return
        data = b"".join(lines)
        with self._lock:
            if self._end < 0:
                raise ValueError("the journal is closed")
            end, self._end = self._end, -1
            write_at(self._descriptor, data, end)
            sync_data(self._descriptor)
            self._end = end + len(data)
            self.records += len(lines)

    def close(self) -> None:
        """Close the file. Calling it again has no effect."""
        with self._lock:
            self._end = -1
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1


def read_journal(path: Path) -> JournalContent | None:
    """Read a journal up to its first damaged line; None if it does not exist. Raises OSError if reading fails."""
    records: list[Mapping[str, Any]] = []
    try:
        stream = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return None
    with stream:
        while (record := _decode(stream.readline(_LONGEST_LINE))) is not None:
            records.append(record)
    return JournalContent(records[0], tuple(records[1:])) if records else JournalContent({}, ())


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
