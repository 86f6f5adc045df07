"""Accesses to the factors of low-rank products, such as LoRA's B and A: of a matrix, a stack or a slice of one.

The left factor has `rank` elements for each row of the value, the right one has `rank` elements for each column. Of
either one, element k of line l of matrix m is the element of the part at the index ``offset + m * matrix_stride +
l * stride + k * rank_stride``, where the lines are rows or columns of the value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from .base import Access, Shape, Span, coalesced, matrices, most_rows, row_range


class Strides(NamedTuple):
    """Where the elements of a factor are staged: element k of line l of matrix m, counted from the first matrix of the
    value, is at the index ``origin + m * matrix + l * line + k * rank``."""

    origin: int
    matrix: int
    line: int
    rank: int


@dataclass(frozen=True, slots=True)
class FactorAccess(Access, ABC):
    """The base of all accesses to factors."""

    @property
    def aligned(self) -> bool:
        """False: the elements of a factor are not those of the value."""
        return False

    @property
    @abstractmethod
    def by_row(self) -> bool:
        """Whether it is the left factor, whose lines are the value's rows."""

    @abstractmethod
    def size(self, shape: Shape, part: Shape) -> tuple[int, int]:
        """Return the number of the lines of a matrix, and the rank."""

    @abstractmethod
    def strides(self, shape: Shape, part: Shape, first: int, count: int) -> Strides:
        """Return where the elements are that are staged for elements [first, first + count) of the value."""


@dataclass(frozen=True, slots=True)
class SameRows(FactorAccess):
    """The same rows of a part that has other columns, such as LoRA's B. Staged are complete rows."""

    @property
    def by_row(self) -> bool:
        """True."""
        return True

    def part_shape_fits(self, shape: Shape, part: Shape) -> bool:
        """Return whether the part has as many rows as the value."""
        return len(part) > 0 and part[:-1] == shape[:-1]

    def resized(self, part: Shape, shape: Shape) -> tuple[Access, Shape]:
        """Return the same access, and a part with as many columns."""
        return self, (*shape[:-1], part[-1])

    def size(self, shape: Shape, part: Shape) -> tuple[int, int]:
        """Return the rows of a matrix and the part's columns."""
        return matrices(shape)[1], part[-1]

    def spans(self, shape: Shape, part: Shape, first: int, count: int) -> list[Span]:
        """Return one range: the rows of the range's first to last element."""
        begin, end = row_range(shape, first, count)
        return [Span(begin * part[-1], (end - begin) * part[-1])]

    def strides(self, shape: Shape, part: Shape, first: int, count: int) -> Strides:
        """Return those of rows that follow each other, from the range's first one on."""
        rank = part[-1]
        return Strides(-row_range(shape, first, count)[0] * rank, matrices(shape)[1] * rank, rank, 1)

    def most(self, shape: Shape, part: Shape, count: int) -> int:
        """Return the elements of the most rows that `count` elements touch."""
        return most_rows(shape, count) * part[-1]


@dataclass(frozen=True, slots=True)
class Whole(FactorAccess):
    """All of the part for every range, such as LoRA's A, whose rows are used by all matrices of a stack."""

    @property
    def by_row(self) -> bool:
        """False."""
        return False

    def whole(self, shape: Shape, part: Shape) -> bool:
        """True."""
        return True

    def part_shape_fits(self, shape: Shape, part: Shape) -> bool:
        """Return True: all of any part can be used."""
        return True

    def resized(self, part: Shape, shape: Shape) -> tuple[Access, Shape]:
        """Return the same access, and a part with as many rows and the value's columns, such as LoRA's A."""
        return self, (*part[:-1], *shape[-1:])

    def size(self, shape: Shape, part: Shape) -> tuple[int, int]:
        """Return the part's columns and rows."""
        return part[-1] if part else 1, prod(part[:-1])

    def spans(self, shape: Shape, part: Shape, first: int, count: int) -> list[Span]:
        """Return one range, the complete part."""
        return [Span(0, prod(part))]

    def strides(self, shape: Shape, part: Shape, first: int, count: int) -> Strides:
        """Return those of the part."""
        return Strides(0, 0, 1, self.size(shape, part)[0])

    def most(self, shape: Shape, part: Shape, count: int) -> int:
        """Return the elements of the part."""
        return prod(part)


@dataclass(frozen=True, slots=True)
class _Strided(FactorAccess):
    """A factor that is stored with other strides, or is a slice of a larger part.

    Args:
        rank: number of elements of a line.
        stride: distance of two lines.
        rank_stride: distance of two elements of a line.
        matrix_stride: distance of two matrices of a stack.
        offset: index of the first element.
    """

    rank: int
    stride: int
    rank_stride: int
    matrix_stride: int = 0
    offset: int = 0

    def part_shape_fits(self, shape: Shape, part: Shape) -> bool:
        """Return whether the last element lies in the part; of an empty value, none are used."""
        if prod(shape) == 0:
            return True
        if min(self.rank, self.stride, self.rank_stride, self.matrix_stride + 1, self.offset + 1) < 1:
            return False
        length = (matrices(shape)[0] - 1) * self.matrix_stride + self.matrix_length(shape)
        return self.offset + length <= prod(part)

    def size(self, shape: Shape, part: Shape) -> tuple[int, int]:
        """Return the rows or columns of a matrix, and the rank."""
        return matrices(shape)[1 if self.by_row else 2], self.rank

    def matrix_length(self, shape: Shape) -> int:
        """Return the number of elements from the first to the last one of a matrix."""
        lines, _ = self.size(shape, ())
        return (lines - 1) * self.stride + (self.rank - 1) * self.rank_stride + 1

    def separate(self, shape: Shape) -> bool:
        """Return whether there are no elements of other matrices between those of a matrix."""
        length, stack = self.matrix_length(shape), matrices(shape)[0]
        return length == prod(self.size(shape, ())) and (stack == 1 or self.matrix_stride >= length)

    def matrices_of(self, shape: Shape, first: int, count: int) -> tuple[int, int]:
        """Return the matrices [begin, end) that a range of elements is in."""
        begin, end = row_range(shape, first, count)
        rows = matrices(shape)[1]
        return begin // rows, -(-end // rows)

    def most_matrices(self, shape: Shape, count: int) -> int:
        """Return the number of matrices that `count` elements in a row touch, at most."""
        stack, rows, columns = matrices(shape)
        return min(stack, 2 + (count - 2) // (rows * columns) if count > 1 else 1)

    def resized(self, part: Shape, shape: Shape) -> tuple[Access, Shape]:
        """Return the access to a part that has nothing but the factors of the value's matrices, in the same order."""
        stack = matrices(shape)[0]
        lines, _ = self.size(shape, part)
        if self.rank_stride <= self.stride:
            access = type(self)(self.rank, self.rank, 1, lines * self.rank)
        else:
            access = type(self)(self.rank, 1, lines, lines * self.rank)
        return access, (stack * lines * self.rank,)


@dataclass(frozen=True, slots=True)
class RowFactor(_Strided):
    """The left factor, such as a B that is stored transposed, or one that has those of several matrices.

    If the elements of a row follow each other, the rows of the range are staged. If rows follow each other, so do the
    staged elements with the same k: those of the range's rows, or of all rows of the matrices if there are several.
    Otherwise, such as with an expert's elements between those of others, the complete part is staged.
    """

    @property
    def by_row(self) -> bool:
        """True."""
        return True

    @property
    def scattered(self) -> bool:
        """Whether the elements of a row and those of a column are apart."""
        return self.rank_stride != 1 and self.stride != 1

    def whole(self, shape: Shape, part: Shape) -> bool:
        """Return whether the complete part is staged."""
        return self.scattered

    def spans(self, shape: Shape, part: Shape, first: int, count: int) -> list[Span]:
        """Return one range for each row, or for each k; those that follow each other as one."""
        if self.scattered:
            return [Span(0, prod(part))]
        rows = matrices(shape)[1]
        if self.rank_stride == 1:
            lines = (divmod(row, rows) for row in range(*row_range(shape, first, count)))
            return coalesced(
                Span(self.offset + matrix * self.matrix_stride + row * self.stride, self.rank) for matrix, row in lines
            )
        low, length = self._staged_rows(shape, first, count)
        return coalesced(
            Span(self.offset + matrix * self.matrix_stride + low + k * self.rank_stride, length)
            for matrix in range(*self.matrices_of(shape, first, count))
            for k in range(self.rank)
        )

    def strides(self, shape: Shape, part: Shape, first: int, count: int) -> Strides:
        """Return where the elements are that are staged for a range."""
        if self.scattered:
            return Strides(self.offset, self.matrix_stride, self.stride, self.rank_stride)
        rows = matrices(shape)[1]
        if self.rank_stride == 1:
            return Strides(-row_range(shape, first, count)[0] * self.rank, rows * self.rank, self.rank, 1)
        low, length = self._staged_rows(shape, first, count)
        matrix = self.rank * length
        return Strides(-self.matrices_of(shape, first, count)[0] * matrix - low, matrix, 1, length)

    def _staged_rows(self, shape: Shape, first: int, count: int) -> tuple[int, int]:
        """The first of the rows that are staged of a matrix, and their number."""
        rows = matrices(shape)[1]
        begin, end = row_range(shape, first, count)
        return (begin % rows, end - begin) if begin // rows == (end - 1) // rows else (0, rows)

    def most(self, shape: Shape, part: Shape, count: int) -> int:
        """Return the elements that are staged for any `count` elements in a row, at most."""
        rows, touched = matrices(shape)[1], self.most_matrices(shape, count)
        if self.scattered:
            return prod(part)
        if self.rank_stride == 1 or touched == 1:
            return most_rows(shape, count) * self.rank
        return touched * rows * self.rank


@dataclass(frozen=True, slots=True)
class ColumnFactor(_Strided):
    """The right factor, such as an A that is stored transposed, or one that has those of several matrices.

    Staged are the matrices that the range touches, or the complete part if their elements are between each other.
    """

    @property
    def by_row(self) -> bool:
        """False."""
        return False

    def whole(self, shape: Shape, part: Shape) -> bool:
        """Return whether there is one matrix, or the complete part is staged."""
        return matrices(shape)[0] == 1 or not self.separate(shape)

    def spans(self, shape: Shape, part: Shape, first: int, count: int) -> list[Span]:
        """Return one range: the elements of the matrices, with those between them, or the complete part."""
        if not self.separate(shape):
            return [Span(0, prod(part))]
        begin, end = self.matrices_of(shape, first, count)
        length = (end - begin - 1) * self.matrix_stride + self.matrix_length(shape)
        return [Span(self.offset + begin * self.matrix_stride, length)]

    def strides(self, shape: Shape, part: Shape, first: int, count: int) -> Strides:
        """Return those of the part, from its first staged element on."""
        start = self.spans(shape, part, first, count)[0].start
        return Strides(self.offset - start, self.matrix_stride, self.stride, self.rank_stride)

    def most(self, shape: Shape, part: Shape, count: int) -> int:
        """Return the elements of the most matrices that `count` elements touch, with those between them."""
        if not self.separate(shape):
            return prod(part)
        return (self.most_matrices(shape, count) - 1) * self.matrix_stride + self.matrix_length(shape)
