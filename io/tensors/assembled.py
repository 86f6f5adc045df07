"""Tensors that are stored in several parts, such as the fused experts of a model that stores each expert separately."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .refs import TensorRef

ReadRange = Callable[[Path, int, memoryview], None]
"""``read(file, offset, buffer)`` fills the buffer with the bytes of a file that start at an offset."""

_SMALL = 4096
"""Units of fewer bytes are read together; as many bytes hold those of one part."""


class FileRange(NamedTuple):
    """A range of bytes of a file.

    Args:
        file: the file.
        offset: offset of the first byte in the file.
        nbytes: number of bytes.
    """

    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class AssembledRef(TensorRef):
    """A tensor whose bytes are those of several stored tensors of equal size; `file` and `offset` are the first one's.

    The parts form groups, such as the gate and the up projection of each expert. The bytes of a group are those of its
    parts in turns of `unit` bytes: one part after the other if a unit is a complete part, interleaved if it is a row.

    Args:
        part_files: file of each part.
        part_offsets: position of each part's first byte in its file, in bytes.
        group: number of parts in a group.
        unit: number of bytes of a turn; a divisor of the size of a part.
    """

    part_files: tuple[Path, ...]
    part_offsets: tuple[int, ...]
    group: int
    unit: int

    @property
    def part_nbytes(self) -> int:
        """The size of a part in bytes."""
        return self.nbytes // len(self.part_offsets)

    @property
    def interleaved(self) -> bool:
        """Whether the parts take turns, so the first bytes of the tensor are not those of its first parts."""
        return self.group > 1 and self.unit < self.part_nbytes

    def read(self, read: ReadRange, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes of the tensor that start at `start`."""
        group_nbytes, turn = self.group * self.part_nbytes, self.group * self.unit
        done = 0
        while done < len(buffer):
            group, inside = divmod(start + done, group_nbytes)
            row, within = divmod(inside, turn)
            rows = min(len(buffer) - done, group_nbytes - inside) // turn
            if self.interleaved and within == 0 and rows > 1 and self.unit < _SMALL:
                rows = min(rows, _SMALL // self.unit)
                self._read_turns(read, group, row, buffer[done : done + rows * turn])
                done += rows * turn
                continue
            which, skipped = divmod(within, self.unit)
            length = min(self.unit - skipped, len(buffer) - done)
            part = group * self.group + which
            offset = self.part_offsets[part] + row * self.unit + skipped
            read(self.part_files[part], offset, buffer[done : done + length])
            done += length

    def _read_turns(self, read: ReadRange, group: int, row: int, buffer: memoryview) -> None:
        """Fill a buffer with complete turns of a group: one read of each part, whose units are then spread out."""
        unit, step = self.unit, self.group * self.unit
        rows = len(buffer) // step
        for which in range(self.group):
            part = group * self.group + which
            units = bytearray(rows * unit)
            read(self.part_files[part], self.part_offsets[part] + row * unit, memoryview(units))
            if unit < rows:
                for byte in range(unit):
                    buffer[which * unit + byte :: step] = units[byte::unit]
                continue
            for number in range(rows):
                place = number * step + which * unit
                buffer[place : place + unit] = units[number * unit : (number + 1) * unit]


def read_tensor(read: ReadRange, ref: TensorRef, start: int, buffer: memoryview) -> None:
    """Fill a buffer with the bytes of a tensor that start at `start`.

    Args:
        read: function that reads a range of a file.
        ref: the tensor.
        start: position of the first byte in the tensor.
        buffer: the buffer, no longer than what follows in the tensor.
    """
    if isinstance(ref, AssembledRef):
        ref.read(read, start, buffer)
    else:
        read(ref.file, ref.offset + start, buffer)


def files_of(ref: TensorRef) -> tuple[Path, ...]:
    """Return the files that hold a tensor, each once."""
    return tuple(dict.fromkeys(ref.part_files)) if isinstance(ref, AssembledRef) else (ref.file,)


def stored_parts(ref: TensorRef) -> Iterator[FileRange]:
    """Yield where the parts of a tensor are stored; a tensor that is stored in one place is its only part.

    One part after another, they define the *stored order* of a tensor's bytes. It is that of the tensor itself unless
    the tensor is interleaved.
    """
    if not isinstance(ref, AssembledRef):
        yield FileRange(ref.file, ref.offset, ref.nbytes)
        return
    nbytes = ref.part_nbytes
    for file, offset in zip(ref.part_files, ref.part_offsets, strict=True):
        yield FileRange(file, offset, nbytes)


def stored_ranges(ref: TensorRef, start: int, end: int) -> list[FileRange]:
    """Return where the bytes from `start` to `end` of a tensor are stored, counted in stored order."""
    if not isinstance(ref, AssembledRef):
        return [FileRange(ref.file, ref.offset + start, end - start)]
    ranges, size = [], ref.part_nbytes
    while start < end:
        part, skipped = divmod(start, size)
        length = min(size - skipped, end - start)
        ranges.append(FileRange(ref.part_files[part], ref.part_offsets[part] + skipped, length))
        start += length
    return ranges
