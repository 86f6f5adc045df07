"""Accesses to parts that have an element for each element of the value, or for each of its blocks or rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from .base import Access, Shape, Span, coalesced, matrices, most_rows, row_pieces, row_range
from .row_index import RowIndex


@dataclass(frozen=True, slots=True)
class BlockRows(Access):
    """One element for each block of a matrix, such as a scale. Blocks at the edges are partial.

    Staged are complete rows of the part, from the block of the range's first row on.

    Args:
        rows: rows of a block.
        columns: columns of a block.
    """

    rows: int
    columns: int

    @property
    def aligned(self) -> bool:
        """False: several elements of the value share one of the part."""
        return False

    def part_shape_fits(self, shape: Shape, part: Shape) -> bool:
        """Return whether the part has one element for each block of each matrix; of an empty value, none are used.

        A part with a single block in each row may have no dimension for it.
        """
        stack, rows, columns = matrices(shape)
        width = -(-columns // self.columns)
        is_flat = len(part) == 1 or (len(part) < len(shape) and part[-1:] == (self.block_rows(rows),))
        complete = part[-1:] in ((), (width,)) or (width == 1 and is_flat)
        return 0 in shape or (prod(part) == stack * self.block_rows(rows) * width and complete)

    def resized(self, part: Shape, shape: Shape) -> tuple[Access, Shape]:
        """Return the same access, and one element of the part for each block."""
        stack, rows, columns = matrices(shape)
        return self, (stack * self.block_rows(rows), -(-columns // self.columns))

    def block_rows(self, rows: int) -> int:
        """Return the number of rows of blocks in a matrix with this number of rows."""
        return -(-rows // self.rows)

    def block_row(self, shape: Shape, row: int) -> int:
        """Return the row of the part that holds the blocks of a row of the value."""
        _, rows, _ = matrices(shape)
        return row // rows * self.block_rows(rows) + row % rows // self.rows

    def spans(self, shape: Shape, part: Shape, first: int, count: int) -> list[Span]:
        """Return one range: the rows of the part between the blocks of the first and of the last row."""
        begin, end = row_range(shape, first, count)
        width = -(-max(1, shape[-1] if shape else 1) // self.columns)
        low, high = self.block_row(shape, begin), self.block_row(shape, end - 1) + 1
        return [Span(low * width, (high - low) * width)]

    def most(self, shape: Shape, part: Shape, count: int) -> int:
        """Return the elements of the most rows of the part that `count` elements touch."""
        stack, rows, columns = matrices(shape)
        touched = most_rows(shape, count)
        between = (touched - 2) // self.rows + (1 + (touched - 2) // rows if stack > 1 else 0)
        blocks = min(touched, 2 + between) if touched > 1 else 1
        return min(blocks, stack * self.block_rows(rows)) * -(-columns // self.columns)


@dataclass(frozen=True, slots=True)
class Nibbles(Access):
    """Two elements in each byte of a part, the first one in the low four bits, such as the codes of 4-bit formats.

    The part has the value's rows; each begins with a byte of its own. Staged are the bytes from the range's first
    element to its last one.

    Args:
        numbers: what four bits are: ``U4``, an integer, or ``F4``, a floating-point number of the OCP format E2M1.
    """

    numbers: str

    @property
    def aligned(self) -> bool:
        """False: a byte has two elements."""
        return False

    def part_shape_fits(self, shape: Shape, part: Shape) -> bool:
        """Return whether the part has as many rows, and a byte for every two columns."""
        return len(part) == len(shape) > 0 and part[:-1] == shape[:-1] and 2 * part[-1] >= shape[-1]

    def resized(self, part: Shape, shape: Shape) -> tuple[Access, Shape]:
        """Return the same access, and a part with as many bytes as the columns need."""
        return self, ((*shape[:-1], -(-shape[-1] // 2)) if shape else (1,))

    def spans(self, shape: Shape, part: Shape, first: int, count: int) -> list[Span]:
        """Return one range: the bytes of the range's first to last element."""
        low, high = (self.byte(shape, part, element) for element in (first, first + count - 1))
        return [Span(low, high + 1 - low)]

    def byte(self, shape: Shape, part: Shape, element: int) -> int:
        """Return the index of the byte that an element is in."""
        row, column = divmod(element, max(1, shape[-1]))
        return row * part[-1] + column // 2

    def most(self, shape: Shape, part: Shape, count: int) -> int:
        """Return the bytes that `count` elements in a row touch at most, with those at the ends of rows."""
        rows = most_rows(shape, count)
        return min(prod(part), count // 2 + 1 + (rows - 1) * (part[-1] - shape[-1] // 2))


@dataclass(frozen=True, slots=True)
class GatheredRows(Access):
    """Row r of the value is row `index[r]` of the part, such as a token's embedding; -1 stands for a row of zeros.

    The elements of a vector are rows, too, if the index has as many.

    Args:
        index: for each row of the value, the row of the part, or -1.
    """

    index: RowIndex

    @classmethod
    def of(cls, rows: Iterable[int]) -> GatheredRows:
        """Return the access for these rows of the part."""
        return cls(RowIndex(rows))

    def part_shape_fits(self, shape: Shape, part: Shape) -> bool:
        """Return whether the columns are equal and the part has every row that the index names."""
        vector = len(shape) == len(part) == 1 and len(self.index) == shape[0]
        same = vector or (shape[-1:] == part[-1:] != () and len(self.index) == prod(shape[:-1]))
        return same and self.index.highest < (part[0] if vector else prod(part[:-1]))

    def spans(self, shape: Shape, part: Shape, first: int, count: int) -> list[Span]:
        """Return the ranges of the rows, those that follow each other in the part as one."""
        columns = max(1, prod(shape) // len(self.index))
        spans = []
        for row, source, length in self.index.runs(first // columns, -(-(first + count) // columns)):
            low, high = max(first, row * columns), min(first + count, (row + length) * columns)
            spans.append(Span(-1 if source < 0 else low + (source - row) * columns, high - low))
        return spans


@dataclass(frozen=True, slots=True)
class Slice(Access):
    """A slice of a larger part: element (matrix, row, column) of the value is the element of the part at the index
    ``offset + matrix * matrix_stride + row * stride + column``, such as one expert of a fused tensor.

    Args:
        offset: index of the first element.
        stride: distance of two rows, at least the value's columns.
        matrix_stride: distance of two matrices of a stack.
    """

    offset: int
    stride: int
    matrix_stride: int = 0

    def part_shape_fits(self, shape: Shape, part: Shape) -> bool:
        """Return whether the last element lies in the part."""
        stack, rows, columns = matrices(shape)
        last = self.offset + (stack - 1) * self.matrix_stride + (rows - 1) * self.stride + columns - 1
        return self.stride >= columns and (prod(shape) == 0 or last < prod(part))

    def spans(self, shape: Shape, part: Shape, first: int, count: int) -> list[Span]:
        """Return the ranges of the rows, those that follow each other in the part as one."""
        _, rows, columns = matrices(shape)
        return coalesced(
            Span(self.offset + row // rows * self.matrix_stride + row % rows * self.stride + begin, length)
            for row, begin, length in row_pieces(max(1, columns), first, count)
        )


@dataclass(frozen=True, slots=True)
class TransposedSlice(Access):
    """A transposed slice: element (matrix, row, column) of the value is the element of the part at the index
    ``offset + matrix * matrix_stride + column * stride + row // group * step``.

    For each matrix that the range touches and each of its columns, the elements of the range's rows are staged, those
    between them included if `step` is more than 1.

    Args:
        offset: index of the first element.
        stride: distance of two columns of the value.
        step: distance of two rows, or groups of rows, of the value: 2 if two tensors are interleaved.
        matrix_stride: distance of two matrices of a stack.
        group: rows that share an element, such as a scale.
        numbers: what four bits are if an element is a byte with those of two rows, the first in the low bits; see
            `Nibbles`. Then `group` is 2. Empty for other elements.
    """

    offset: int
    stride: int
    step: int = 1
    matrix_stride: int = 0
    group: int = 1
    numbers: str = ""

    @property
    def aligned(self) -> bool:
        """False: the order of the elements differs."""
        return False

    def part_shape_fits(self, shape: Shape, part: Shape) -> bool:
        """Return whether the last element lies in the part."""
        stack, rows, columns = matrices(shape)
        last = self.offset + (stack - 1) * self.matrix_stride + (columns - 1) * self.stride
        return prod(shape) == 0 or last + (rows - 1) // self.group * self.step < prod(part)

    def resized(self, part: Shape, shape: Shape) -> tuple[Access, Shape]:
        """Return the access to a part that has nothing but the value's matrices, and what lies between their rows."""
        stack, rows, columns = matrices(shape)
        height = -(-rows // self.group) * self.step
        access = TransposedSlice(0, height, self.step, height * columns, self.group, self.numbers)
        return access, (stack, columns, height)

    def spans(self, shape: Shape, part: Shape, first: int, count: int) -> list[Span]:
        """Return one range for each column of each matrix, those that follow each other in the part as one."""
        _, rows, columns = matrices(shape)
        begin, end = row_range(shape, first, count)
        pieces = []
        for matrix in range(begin // rows, -(-end // rows)):
            low, high = max(begin - matrix * rows, 0), min(end - matrix * rows, rows)
            start = self.offset + matrix * self.matrix_stride + low // self.group * self.step
            length = self.staged_rows(low, high)
            pieces += [Span(start + column * self.stride, length) for column in range(columns)]
        return coalesced(pieces)

    def staged_rows(self, low: int, high: int) -> int:
        """Return the elements that are staged of a column for the rows [low, high) of a matrix."""
        return ((high - 1) // self.group - low // self.group) * self.step + 1

    def most(self, shape: Shape, part: Shape, count: int) -> int:
        """Return the elements of the most rows that `count` elements touch, with those between them."""
        stack, rows, columns = matrices(shape)
        touched = most_rows(shape, count)
        between = (touched - 2) // self.group + (1 + (touched - 2) // rows if stack > 1 else 0)
        groups = min(touched, 2 + between) if touched > 1 else 1
        return groups * self.step * columns
