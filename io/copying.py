"""Moving a range of bytes from one file to another by the cheapest way that both file systems allow."""

from __future__ import annotations

from dataclasses import dataclass

from .platform import clone_range, copy_range, read_at, write_at

BLOCK = 4096
"""Blocks are shared in units of this; a file system with larger ones refuses, and the bytes are copied."""


@dataclass(slots=True)
class Moved:
    """How bytes were moved.

    Args:
        shared: bytes whose disk blocks both files now have in common.
        copied: bytes that the kernel copied.
        carried: bytes that went through this process.
    """

    shared: int = 0
    copied: int = 0
    carried: int = 0

    def add(self, other: Moved) -> None:
        """Count what `other` moved, too."""
        self.shared += other.shared
        self.copied += other.copied
        self.carried += other.carried


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
) -> Moved:
    """Make a range of one file a copy of a range of another.

    Args:
        source: a descriptor, open for reading.
        source_offset: of the range's first byte.
        target: a descriptor, open for writing; the file is large enough already.
        target_offset: of the range's first byte there.
        nbytes: of the range.
        buffer: for bytes that neither can be shared nor copied by the kernel.
        share: whether to try to share blocks.

    Raises:
        OSError: where the disk can't.
        EOFError: where the source ends before.
    """
    moved = Moved()
    first, count = shareable(source_offset, target_offset, nbytes) if share else (0, 0)
    if count and clone_range(source, source_offset + first, target, target_offset + first, count):
        moved.shared = count
        parts = [(0, first), (first + count, nbytes - first - count)]
    else:
        parts = [(0, nbytes)]
    for start, size in parts:
        done = 0
        while done < size:
            step = copy_range(source, source_offset + start + done, target, target_offset + start + done, size - done)
            if step == 0:
                break
            moved.copied += step
            done += step
        while done < size:
            view = buffer[: size - done]
            step = read_at(source, view, source_offset + start + done)
            if step == 0:
                raise EOFError(source_offset + start + done)
            write_at(target, view[:step], target_offset + start + done)
            moved.carried += step
            done += step
    return moved
