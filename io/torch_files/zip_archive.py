"""Reads the directory of a zip archive whose entries are stored, not compressed: each entry is a range of bytes.

Sources: PKWARE's APPNOTE 6.3.10, sections 4.3 and 4.5.3; caffe2/serialize/inline_container.cc of PyTorch.

Accepted is what ``torch.save`` and zip tools write without compression, and nothing else: entries follow each other
without gaps from the first byte of the file to the central directory, each with a local header that agrees with the
directory. So no two entries overlap, and no two programs can see different contents.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

from ..open_source import quoted
from .source import DAMAGED, Metadata

_LOCAL, _CENTRAL, _END, _DESCRIPTOR = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\7\b"
_END64, _LOCATOR64 = b"PK\6\6", b"PK\6\7"
_LOCAL_HEADER = Struct("<4s5H3L2H")
_CENTRAL_HEADER = Struct("<4s6H3L5H2L")
_END_RECORD = Struct("<4s4H2LH")
_END64_RECORD = Struct("<4sQ2H2L4Q")
_LOCATOR = Struct("<4sLQL")
_DESCRIPTOR32 = Struct("<4s3L")
_DESCRIPTOR64 = Struct("<4sL2Q")

_ENCRYPTED, _HAS_DESCRIPTOR, _UTF8 = 1, 8, 0x800  # flags; all others change what the bytes mean
_ZIP64 = 1  # id of an extra field
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_MAX_ENTRIES = 200_000
_MAX_EXTRA = 4096  # bytes of a local header's extra fields: torch aligns storages to 64 bytes, others to a page


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in an archive.

    Args:
        name: path of the entry.
        offset: position of its first byte in the archive's file, in bytes.
        nbytes: size in bytes.
        crc: CRC-32 of its bytes, as the directory states it.
    """

    name: str
    offset: int
    nbytes: int
    crc: int


@dataclass(frozen=True, slots=True)
class _Listed:
    """An entry as the central directory describes it."""

    name: str
    raw: bytes
    flags: int
    stamp: tuple[int, int, int]  # version needed, time, date
    crc: int
    nbytes: int
    header: int  # offset of the local header


def read_archive(source: Metadata) -> dict[str, Entry]:
    """Read the entries of an archive by name, in the order of their bytes.

    Raises:
        CheckpointError: the archive is damaged, compressed, encrypted, split, or has entries that overlap, have one
            name, leave their directory or disagree with their local headers.
        EnvironmentFailure: reading failed.
    """
    start, size, count = _find_directory(source)
    listed = _parse_directory(source, source.read(start, size), start, count)
    return _read_local_headers(source, sorted(listed, key=lambda each: each.header), start)


# ------------------------------------------------------------------------------------------------ central directory


def _find_directory(source: Metadata) -> tuple[int, int, int]:
    """Find the central directory: its offset and size in bytes, and the number of its entries."""
    end = source.size - _END_RECORD.size
    if end < 0:
        source.refuse(f"has {source.size} bytes, too few for a zip archive: {DAMAGED}")
    magic, disk, first_disk, here, count, size, start, comment = _END_RECORD.unpack(source.read(end, _END_RECORD.size))
    if magic != _END or comment:
        source.refuse(
            "its zip directory is not at the end: the file is truncated, probably by an interrupted download, or "
            "something was appended to it: download it again"
        )
    record = end
    locator = end - _LOCATOR.size
    raw = source.read(locator, _LOCATOR.size) if locator >= _END64_RECORD.size else b""
    if raw.startswith(_LOCATOR64):
        _, locator_disk, record, disks = _LOCATOR.unpack(raw)
        if record != locator - _END64_RECORD.size or locator_disk or disks != 1:
            source.refuse(f"its zip64 locator does not point to the record before it: {DAMAGED}")
        fields = _END64_RECORD.unpack(source.read(record, _END64_RECORD.size))
        wide = fields[4:]
        narrow = (disk, first_disk, here, count, size, start)
        limits = (_MAX16, _MAX16, _MAX16, _MAX16, _MAX32, _MAX32)
        agree = all(value in (large, limit) for value, large, limit in zip(narrow, wide, limits, strict=True))
        if fields[0] != _END64 or fields[1] != _END64_RECORD.size - 12 or not agree:
            source.refuse(f"its two zip directories, with 32 and 64 bits, disagree: {DAMAGED}")
        disk, first_disk, here, count, size, start = wide
    if disk or first_disk or here != count:
        source.refuse(f"is a part of a split zip archive: {DAMAGED}")
    if start + size != record:
        source.refuse(
            f"its zip directory has {size:,} bytes at {start:,}, and not those before byte {record:,}: {DAMAGED}"
        )
    if not 0 < count <= _MAX_ENTRIES or count * _CENTRAL_HEADER.size > size:
        source.refuse(
            f"its zip directory of {size:,} bytes states {count:,} entries, of at most {_MAX_ENTRIES:,}: {DAMAGED}"
        )
    return start, size, count


def _parse_directory(source: Metadata, raw: bytes, end: int, count: int) -> list[_Listed]:
    """Parse the central directory. `end` is its own offset, before which all entries end."""
    listed: dict[str, _Listed] = {}
    position = 0
    for _ in range(count):
        if position + _CENTRAL_HEADER.size > len(raw):
            source.refuse(f"its zip directory ends within an entry: {DAMAGED}")
        fields = _CENTRAL_HEADER.unpack_from(raw, position)
        magic, _, needed, flags, method, time, date, crc, stored, nbytes, *rest = fields
        name_length, extra_length, comment, disk, _, _, header = rest
        first = position + _CENTRAL_HEADER.size
        position = first + name_length + extra_length
        if magic != _CENTRAL or position > len(raw):
            source.refuse(f"its zip directory is not a list of entries: {DAMAGED}")
        raw_name = raw[first : first + name_length]
        name = _check_name(source, raw_name)
        if name in listed:
            source.refuse(f"its zip directory lists {quoted(name)} more than once: {DAMAGED}")
        if comment or disk:
            source.refuse(f"{quoted(name)} has a comment or is on another disk of a split archive: {DAMAGED}")
        _check_storing(source, name, flags, method)
        extra = _zip64_values(source, name, raw[first + name_length : position], (nbytes, stored, header))
        nbytes, stored, header = extra
        if nbytes != stored:
            source.refuse(f"{quoted(name)} has {nbytes:,} bytes, of which {stored:,} are stored: {DAMAGED}")
        if header + _LOCAL_HEADER.size + name_length + nbytes > end:
            source.refuse(f"{quoted(name)} with {nbytes:,} bytes at {header:,} ends after byte {end:,}: {DAMAGED}")
        listed[name] = _Listed(name, raw_name, flags, (needed, time, date), crc, nbytes, header)
    if position != len(raw):
        source.refuse(f"its zip directory has {len(raw) - position} bytes after its last entry: {DAMAGED}")
    return list(listed.values())


def _check_name(source: Metadata, raw: bytes) -> str:
    """Decode the name of an entry. Raises CheckpointError if it does not stay inside a directory."""
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        source.refuse(f"its zip directory has the name {quoted(raw)}, which is not UTF-8: {DAMAGED}")
    parts = name.split("/")
    if "\\" in name or not name.isprintable() or ":" in name or any(part in ("", ".", "..") for part in parts):
        source.refuse(
            f"its zip directory has the name {quoted(name)}, which is not a path of a file inside the archive: don't "
            "trust this file"
        )
    return name


def _check_storing(source: Metadata, name: str, flags: int, method: int) -> None:
    """Refuse an entry that is not just stored."""
    if flags & _ENCRYPTED:
        source.refuse(f"{quoted(name)} is encrypted: unpack the archive, and save the model again with torch.save")
    if method:
        source.refuse(
            f"{quoted(name)} is compressed (method {method}), and mergeloom reads ranges of files without unpacking "
            "them: save the model again with torch.save, which does not compress"
        )
    if flags & ~(_HAS_DESCRIPTOR | _UTF8):
        source.refuse(f"{quoted(name)} has unknown zip flags (0x{flags:04x}): {DAMAGED}")


def _zip64_values(source: Metadata, name: str, extra: bytes, values: tuple[int, int, int]) -> tuple[int, int, int]:
    """Replace the saturated ones of (size, stored size, offset) by those of the zip64 field."""
    found = list(values)
    wide: bytes | None = None
    for kind, content in _extra_fields(source, name, extra):
        if kind == _ZIP64:
            if wide is not None:
                source.refuse(f"{quoted(name)} has two zip64 fields: {DAMAGED}")
            wide = content
    missing = [index for index, value in enumerate(values) if value == _MAX32]
    if len(wide or b"") != 8 * len(missing):
        source.refuse(f"{quoted(name)} has a zip64 field that does not fit its sizes: {DAMAGED}")
    for place, index in enumerate(missing):
        assert wide is not None
        found[index] = int.from_bytes(wide[8 * place : 8 * place + 8], "little")
    return found[0], found[1], found[2]


def _extra_fields(source: Metadata, name: str, extra: bytes) -> list[tuple[int, bytes]]:
    """Split extra fields into (id, content)."""
    fields = []
    position = 0
    while position < len(extra):
        kind = int.from_bytes(extra[position : position + 2], "little")
        length = int.from_bytes(extra[position + 2 : position + 4], "little")
        end = position + 4 + length
        if end > len(extra):
            source.refuse(f"{quoted(name)} has extra fields that are not complete: {DAMAGED}")
        fields.append((kind, extra[position + 4 : end]))
        position = end
    return fields


# ------------------------------------------------------------------------------------------------ local headers


def _read_local_headers(source: Metadata, listed: list[_Listed], end: int) -> dict[str, Entry]:
    """Compare all local headers with the directory, and find where the bytes of the entries begin.

    Between two entries lies nothing but the descriptor of the first one.
    """
    entries = {}
    expected = 0
    headers = source.read_all([(each.header, _LOCAL_HEADER.size) for each in listed])
    lengths = []
    for each, raw in zip(listed, headers, strict=True):
        *_, name_length, extra_length = _LOCAL_HEADER.unpack(raw)
        if not raw.startswith(_LOCAL) or name_length != len(each.raw) or extra_length > _MAX_EXTRA:
            source.refuse(f"{quoted(each.name)} has no local header at byte {each.header:,}: {DAMAGED}")
        lengths.append((each.header + _LOCAL_HEADER.size, name_length + extra_length))
    names = source.read_all(lengths)
    tails = [(first + length + each.nbytes) for each, (first, length) in zip(listed, lengths, strict=True)]
    following = [*(each.header for each in listed[1:]), end]
    descriptors = source.read_all(
        [
            (tail, min(max(next_header - tail, 0), _DESCRIPTOR64.size + 1))
            for tail, next_header in zip(tails, following, strict=True)
        ]
    )
    for index, each in enumerate(listed):
        if each.header != expected:
            source.refuse(
                f"{quoted(each.name)} begins at byte {each.header:,}, and the entry before it ends at {expected:,}: "
                f"{DAMAGED}"
            )
        _check_local_header(source, each, headers[index], names[index])
        descriptor = descriptors[index]
        _check_descriptor(source, each, descriptor)
        expected = tails[index] + len(descriptor)
        first, length = lengths[index]
        entries[each.name] = Entry(each.name, first + length, each.nbytes, each.crc)
    if expected != end:
        source.refuse(f"its entries end at byte {expected:,}, and its zip directory begins at {end:,}: {DAMAGED}")
    return entries


def _check_local_header(source: Metadata, listed: _Listed, header: bytes, rest: bytes) -> None:
    """Refuse a local header that disagrees with the directory."""
    _, needed, flags, method, time, date, crc, stored, nbytes, _, _ = _LOCAL_HEADER.unpack(header)
    name, extra = rest[: len(listed.raw)], rest[len(listed.raw) :]
    sizes = [nbytes, stored]
    for kind, content in _extra_fields(source, listed.name, extra):
        if kind == _ZIP64:
            wide = _wide_sizes(source, listed, content)
            sizes = [large if size == _MAX32 else size for size, large in zip(sizes, wide, strict=True)]
    stated = (crc, *sizes)
    expected = (listed.crc, listed.nbytes, listed.nbytes)
    later = flags & _HAS_DESCRIPTOR and all(value == 0 for value in stated)
    same = (needed, time, date) == listed.stamp and flags == listed.flags and method == 0 and name == listed.raw
    if not same or (stated != expected and not later):
        source.refuse(f"{quoted(listed.name)} has a local header that disagrees with the zip directory: {DAMAGED}")


def _wide_sizes(source: Metadata, listed: _Listed, content: bytes) -> list[int]:
    """Return the sizes in the zip64 field of a local header, which may also have the offset of the header."""
    values = [int.from_bytes(content[place : place + 8], "little") for place in range(0, len(content), 8)]
    sizes = values if len(values) == 2 else values[:-1]
    offset_fits = len(values) == 2 or values[-1:] == [listed.header]
    if len(content) not in (8, 16, 24) or not offset_fits or any(size not in (0, listed.nbytes) for size in sizes):
        source.refuse(f"{quoted(listed.name)} has a zip64 field that disagrees with the zip directory: {DAMAGED}")
    return sizes or [_MAX32, _MAX32]


def _check_descriptor(source: Metadata, listed: _Listed, raw: bytes) -> None:
    """Refuse anything after the bytes of an entry but the descriptor that its flags announce."""
    expected = listed.crc, listed.nbytes, listed.nbytes
    if not listed.flags & _HAS_DESCRIPTOR:
        found = not raw
    elif len(raw) == _DESCRIPTOR32.size:
        found = _DESCRIPTOR32.unpack(raw) == (_DESCRIPTOR, *expected)
    else:
        found = len(raw) == _DESCRIPTOR64.size and _DESCRIPTOR64.unpack(raw) == (_DESCRIPTOR, *expected)
    if not found:
        source.refuse(f"{quoted(listed.name)} is not followed by a matching descriptor or the next entry: {DAMAGED}")
