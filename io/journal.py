"""The journal of an unfinished merge: what it makes, and which bytes of it are durable. Append-only, a line a record.

A line is the XXH3-64 of its JSON in hexadecimal, a space, and the JSON. What comes after the first line that isn't
whole was being written when the process or the machine stopped, and counts for nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from .platform import sync_directory, write_at

FORMAT = 1
_LONGEST = 1 << 30  # bytes of a journal that is read: 16 bytes a 16 MiB block make 1 GiB a petabyte of output


@dataclass(frozen=True, slots=True)
class Found:
    """What a journal says.

    Args:
        facts: what the merge was begun with.
        records: in the order in which they became durable.
        nbytes: how many bytes of the file are whole records.
    """

    facts: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]
    nbytes: int


class Journal:
    """A journal that is being written. Not safe for several threads.

    Args:
        path: of the file.
        found: what was read from it, to go on; None to begin a new one.
        facts: what the merge is begun with.

    Raises:
        OSError: where the disk can't.
    """

    def __init__(self, path: Path, found: Found | None, facts: Mapping[str, Any]) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._end = found.nbytes if found is not None else 0
        self.records = 0
        """Records that this process has added, the facts not counted."""
        os.ftruncate(self._descriptor, self._end)
        if found is None:
            self.append([{"format": FORMAT, **facts}])
            self.records = 0
            sync_directory(path.parent)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records, and make them durable."""
        lines = [_line(record) for record in records]
        data = b"".join(lines)
        write_at(self._descriptor, data, self._end)
        os.fdatasync(self._descriptor)
        self._end += len(data)
        self.records += len(lines)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def read_journal(path: Path) -> Found | None:
    """What a journal says; None where there is none, or not even its first line is whole."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_LONGEST)
    except FileNotFoundError:
        return None
    records: list[Mapping[str, Any]] = []
    position = 0
    while (end := data.find(b"\n", position)) >= 0:
        record = _record(data[position:end])
        if record is None:
            break
        records.append(record)
        position = end + 1
    if not records or records[0].get("format") != FORMAT:
        return None
    return Found(records[0], tuple(records[1:]), position)


def _line(record: Mapping[str, Any]) -> bytes:
    content = json.dumps(record, separators=(",", ":")).encode()
    return xxhash.xxh3_64_hexdigest(content).encode() + b" " + content + b"\n"


def _record(line: bytes) -> Mapping[str, Any] | None:
    digest, _, content = line.partition(b" ")
    if digest != xxhash.xxh3_64_hexdigest(content).encode():
        return None
    record = json.loads(content)
    return record if isinstance(record, dict) else None
