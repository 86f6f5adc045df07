"""The journal of an unfinished merge: what it makes, and which bytes of it are durable. Append-only, a line a record.

A line is the XXH3-64 of its JSON in hexadecimal, a space, and the JSON. What comes after the first line that isn't
whole was being written when the process or the machine stopped, and counts for nothing.

A journal is never added to by another process than the one that began it: whoever goes on with a merge begins a new
one, with what it found to be true in the old one, in the old one's place.

The first line holds the facts, everything that the output's bytes follow from:

    format          version of the journal's format
    mergeloom       version of mergeloom
    arithmetic      version of its arithmetic
    layout          version of its layout
    recipe          text of the recipe
    outputs         digest of every output tensor's name, dtype, shape, operation and sources
    seed            seed of the random methods
    shard_size      maximum size of a shard in bytes
    sources         identity of each source file: model number -> file name -> digest of its size, header and samples
    device          kind of device, where the bytes depend on it; otherwise absent
    methods         identity of the code of the user's own methods, where there are any
    stamps          state of each source file: model number -> file name -> [inode, size, mtime, ctime], in nanoseconds

Each further line is a record, told by its first key. Numbers of nodes, reads and shards are those of the plan, which
the facts determine; digests are XXH3-128 in hexadecimal.

    source, ranges  ranges of a source tensor (a read number) that durable output was made from, or was about to be:
                    [start, end, piece size, sum of the digests of the pieces], in bytes from the start of the tensor
    node, first, blocks, tail
                    digests of the durable blocks of an output (a node number), from block number `first` on; `tail` is
                    [bytes, digest] of the block behind them, where only its first bytes are durable
    copied          [shard number, start, end]: a durable range of a shard that was cloned or copied from a source
    publish         names of all files; from here on they get their final names in OUT

A `source` record comes before the records of what was made from it.
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
class Found:
    """What a journal says.

    Args:
        facts: what the merge was begun with, and the journal's ``format``; empty where the first line is damaged.
        records: in the order in which they became durable.
    """

    facts: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]

    @property
    def readable(self) -> bool:
        """Whether it is a journal as this version writes it."""
        return self.facts.get("format") == FORMAT


class Journal:
    """A journal that is being written. Safe to use from several threads.

    Args:
        path: of the file. One that is there is replaced, all at once.
        facts: what the merge is begun with.
        records: that are true already.

    Raises:
        OSError: where the disk can't; one that was there is still there then.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._lock = threading.Lock()
        self._end = 0
        self.records = 0
        """Records that were added since it was begun."""
        beside = path.with_name(f"{path.name}.new")
        self._descriptor = create_file(beside)
        try:
            self.append([{**facts, "format": FORMAT}, *records])
            rename(beside, path)
            sync_directory(path.parent)
        except BaseException:
            self.close()
            raise
        self.records = 0

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records, and make them durable.

        After a failure nothing can be added any more: nobody knows what of the file is durable then.

        Raises:
            OSError: where the disk can't.
            ValueError: where it was closed, or has failed before.
        """
        lines = [_line(record) for record in records]
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
        """Close the file; a second time does nothing."""
        with self._lock:
            self._end = -1
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1


def read_journal(path: Path) -> Found | None:
    """What a journal says; None where there is none. Raises OSError where it can't be read."""
    records: list[Mapping[str, Any]] = []
    try:
        stream = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return None
    with stream:
        while (record := _record(stream.readline(_LONGEST_LINE))) is not None:
            records.append(record)
    return Found(records[0], tuple(records[1:])) if records else Found({}, ())


def _line(record: Mapping[str, Any]) -> bytes:
    content = json.dumps(record, separators=(",", ":")).encode()
    return xxhash.xxh3_64_hexdigest(content).encode() + b" " + content + b"\n"


def _record(line: bytes) -> Mapping[str, Any] | None:
    digest, _, content = line[:-1].partition(b" ")
    if not line.endswith(b"\n") or digest != xxhash.xxh3_64_hexdigest(content).encode():
        return None
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
