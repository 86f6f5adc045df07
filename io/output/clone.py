"""Moving a range of bytes from one file to another by the cheapest way that both file systems allow."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from ..platform import clone_range, copy_range, read_at, scratch_file, write_at

BLOCK = 4096
"""Blocks are shared in units of this; a file system with larger ones refuses, and the bytes are copied."""


@dataclass(slots=True)
class CopyStats:
    """How bytes were moved.

    Args:
        shared: bytes whose disk blocks both files now have in common.
        copied: bytes that the kernel copied.
        carried: bytes that went through this process.
        refused: bytes that were to be shared and weren't, by the error number with which that was refused.
    """

    shared: int = 0
    copied: int = 0
    user_copied: int = 0
    refused: dict[int, int] = field(default_factory=dict)

    def add(self, other: CopyStats) -> None:
        """Count what `other` moved, too."""
        self.shared += other.shared
        self.copied += other.copied
        self.user_copied += other.user_copied
        for number, nbytes in other.refused.items():
            self.refused[number] = self.refused.get(number, 0) + nbytes

    @property
    def written(self) -> int:
        """Bytes that were read and written, in whatever way."""
        return self.copied + self.user_copied


class SharingRefused(Exception):
    """A file system doesn't share blocks.

    Args:
        number: the error number.
        nbytes: how many bytes it is about.
    """

    def __init__(self, number: int, nbytes: int) -> None:
        super().__init__(number, nbytes)
        self.number = number
        self.nbytes = nbytes


def shareable(source_offset: int, target_offset: int, nbytes: int) -> tuple[int, int]:
    """The part of a range that can be shared: its first byte, from the range's start, and how many there are."""
    if (source_offset - target_offset) % BLOCK:
        return 0, 0
    first = -source_offset % BLOCK
    return (first, (nbytes - first) // BLOCK * BLOCK) if nbytes - first >= BLOCK else (0, 0)


def move(
    source: int,
    source_offset: int,
    target: int,
    target_offset: int,
    nbytes: int,
    buffer: memoryview,
    *,
    share: bool = True,
) -> CopyStats:
    """Make a range of one file a copy of a range of another.

    Args:
        source: a descriptor, open for reading.
        source_offset: of the range's first byte.
        target: a descriptor, open for writing; the file is large enough already.
        target_offset: of the range's first byte there.
        nbytes: of the range.
        buffer: for bytes that neither can be shared nor copied by the kernel.
        share: whether to share blocks as far as that goes, and to copy only the rest.

    Raises:
        SharingRefused: where the file system won't; nothing was copied then.
        OSError: where the disk can't.
        EOFError: where the source ends before.
    """
    moved = CopyStats()
    first, count = shareable(source_offset, target_offset, nbytes) if share else (0, 0)
    parts = [(0, nbytes)]
    if count:
        number = clone_range(source, source_offset + first, target, target_offset + first, count)
        if number:
            raise SharingRefused(number, count)
        moved.shared = count
        parts = [(0, first), (first + count, nbytes - first - count)]
    for start, size in parts:
        _copy(source, source_offset + start, target, target_offset + start, size, buffer, moved)
    return moved


def _copy(
    source: int, source_offset: int, target: int, target_offset: int, nbytes: int, buffer: memoryview, moved: CopyStats
) -> None:
    done = 0
    while done < nbytes:
        step = copy_range(source, source_offset + done, target, target_offset + done, nbytes - done)
        if step == 0:
            break
        moved.copied += step
        done += step
    while done < nbytes:
        view = buffer[: nbytes - done]
        step = read_at(source, view, source_offset + done)
        if step == 0:
            raise EOFError(source_offset + done)
        write_at(target, view[:step], target_offset + done)
        moved.user_copied += step
        done += step


def refuses_to_share(file: Path, directory: Path) -> bool:
    """Whether a file's first block can't be shared with a new file in `directory`, which is tried."""
    scratch = scratch_file(directory)
    if scratch is None:
        return True
    try:
        source = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return clone_range(source, 0, scratch, 0, BLOCK) != 0
        finally:
            os.close(source)
    except OSError:
        return True
    finally:
        os.close(scratch)
