"""The same elements, which is the base of all accesses; and shapes as stacks of matrices, and the rows of ranges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

Shape = tuple[int, ...]


class Span(NamedTuple):
    """A range of elements of a part.

    Args:
        start: index of its first element in the part; -1 for zeros that no file holds.
        length: number of elements.
    """

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Access:
    """The base of all accesses: the same elements of a part that has the value's shape."""

    @property
    def aligned(self) -> bool:
        """Whether the staged bytes are those of the value's elements, one for one."""
        return True

    def whole(self, shape: Shape, part: Shape) -> bool:
        """Return whether every range needs all that is staged of the part for the complete value."""
        return False

    def part_shape_fits(self, shape: Shape, part: Shape) -> bool:
        """Return whether a part of shape `part` can be used for a value of shape `shape`."""
        return shape == part

    def resized(self, part: Shape, shape: Shape) -> tuple[Access, Shape]:
        """Return the access and the shape of the part for a value of another shape, such as a small one to measure."""
        return ALIGNED, shape

    def spans(self, shape: Shape, part: Shape, first: int, count: int) -> list[Span]:
        """Return the ranges of the part that elements [first, first + count) of the value need, in staging order.

        Args:
            shape: shape of the value.
            part: shape of the part.
            first: index of the first element.
            count: number of elements, at least 1.
        """
        return [Span(first, count)]

    def most(self, shape: Shape, part: Shape, count: int) -> int:
        """Return the elements that are staged for any `count` elements in a row, at most."""
        return count


@dataclass(frozen=True, slots=True)
class Aligned(Access):
    """The same elements."""


ALIGNED = Aligned()


def matrices(shape: Shape) -> tuple[int, int, int]:
    """Return a shape as a stack of matrices: their number, and the rows and columns of each, all at least 1."""
    rows, columns = ((1, 1, *shape)[-2:]) if shape else (1, 1)
    return max(1, prod(shape[:-2])), max(1, rows), max(1, columns)


def row_range(shape: Shape, first: int, count: int) -> tuple[int, int]:
    """Return the rows [begin, end) that elements [first, first + count) are in."""
    columns = max(1, shape[-1] if shape else 1)
    return first // columns, -(-(first + count) // columns)


def most_rows(shape: Shape, count: int) -> int:
    """Return the number of rows that `count` elements in a row touch, at most."""
    stack, rows, columns = matrices(shape)
    return min(stack * rows, count if columns == 1 else 2 + (count - 2) // columns if count > 1 else 1)


def row_pieces(columns: int, first: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Yield the row, the first column and the length of each part of elements [first, first + count) in one row."""
    while count:
        row, begin = divmod(first, columns)
        length = min(columns - begin, count)
        yield row, begin, length
        first, count = first + length, count - length


def coalesced(spans: Iterator[Span] | Sequence[Span]) -> list[Span]:
    """Return the spans with those that continue the one before them, or that are zeros like it, made one."""
    result: list[Span] = []
    for span in spans:
        if result:
            last = result[-1]
            both_zeros = last.start < 0 and span.start < 0
            if both_zeros or (last.start >= 0 and span.start == last.start + last.length):
                result[-1] = Span(last.start, last.length + span.length)
                continue
        result.append(span)
    return result
