"""Copies a range between files in the cheapest way available: shared blocks, kernel copy, or read and write."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..platform import clone_range, copy_range, read_at, scratch_file, write_at

BLOCK = 4096
"""The unit of block sharing in bytes. File systems with larger blocks refuse, and the bytes are copied instead."""


@dataclass(slots=True)
class CopyStats:
    """The number of bytes copied in each way.

    Args:
        shared: bytes whose disk blocks both files now share.
        kernel_copied: bytes that the kernel copied.
        user_copied: bytes that passed through this process.
    """

    shared: int = 0
    kernel_copied: int = 0
    user_copied: int = 0

    @property
    def written(self) -> int:
        """The number of bytes that were read and written."""
        return self.kernel_copied + self.user_copied


class SharingRefused(Exception):
    """The file system refused to share blocks.

    Args:
        number: the error number.
        nbytes: the size of the refused range in bytes.
    """

    def __init__(self, number: int, nbytes: int) -> None:
        super().__init__(number, nbytes)
        self.number = number
        self.nbytes = nbytes


def shareable(source_offset: int, target_offset: int, nbytes: int) -> tuple[int, int]:
    """The part of a range that can share blocks: its start relative to the range, and its size in bytes."""
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
    """Copy a range of one file to another.

    Args:
        source: the source's descriptor, open for reading.
        source_offset: the start of the range in the source, in bytes.
        target: the target's descriptor, open for writing; the file must be large enough.
        target_offset: the start of the range in the target, in bytes.
        nbytes: the size of the range in bytes.
        buffer: the buffer for bytes that can be neither shared nor copied by the kernel.
        share: whether to share blocks where possible and copy only the rest.

    Raises:
        SharingRefused: the file system can't share these blocks; nothing was copied.
        OSError: reading or writing failed.
        EOFError: the source ends too early; its argument is the size of the source in bytes.
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
        moved.kernel_copied += step
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
    """Test whether sharing a file's first block with a new file in `directory` fails."""
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
