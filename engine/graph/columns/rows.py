"""Tuples and lists of integers in flat arrays."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import overload


class Rows(Sequence[tuple[int, ...]]):
    """Tuples of integers of 32 bits, such as the sources of each node: 4 bytes for each integer, and 4 for a tuple."""

    __slots__ = ("_ends", "values")

    def __init__(self, rows: Iterable[Iterable[int]] = ()) -> None:
        self.values = array("i")
        self._ends = array("I", [0])
        for row in rows:
            self.append(row)

    def append(self, row: Iterable[int]) -> None:
        """Append a tuple."""
        self.values.extend(row)
        self._ends.append(len(self.values))

    def extend(self, values: array[int], lengths: Sequence[int]) -> None:
        """Append tuples of the given lengths, with the values of one after those of the other."""
        self._ends.extend(array("I", islice(accumulate(lengths, initial=len(self.values)), 1, None)))
        self.values.extend(values)

    def firsts(self, indices: Iterable[int]) -> Iterator[int]:
        """The first integers of the tuples at some indices, which are not empty."""
        return map(self.values.__getitem__, map(self._ends.__getitem__, indices))

    def of(self, indices: Iterable[int]) -> Iterator[array[int]]:
        """The tuples at some indices, as arrays."""
        values, ends = self.values, self._ends
        return (values[ends[index] : ends[index + 1]] for index in indices)

    def length(self, index: int) -> int:
        """The length of a tuple."""
        return self._ends[index + 1] - self._ends[index]

    def having(self, value: int) -> Iterator[int]:
        """The indices of the tuples that have a value, once for each time."""
        position = -1
        for _ in range(self.values.count(value)):
            position = self.values.index(value, position + 1)
            yield bisect_right(self._ends, position) - 1

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return map(self._row, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(index, slice):
            return list(map(self._row, range(len(self))[index]))
        ends = self._ends
        if index < 0:
            index += len(ends) - 1
        return tuple(self.values[ends[index] : ends[index + 1]])

    def _row(self, index: int) -> tuple[int, ...]:
        return tuple(self.values[self._ends[index] : self._ends[index + 1]])


def woven(columns: Iterable[Iterable[int]]) -> array[int]:
    """The rows of columns of equal lengths, one after another, as integers of 32 bits."""
    own = [array("i", column) for column in columns]
    found = array("i", bytes(4 * sum(map(len, own))))
    for place, column in enumerate(own):
        found[place :: len(own)] = column
    return found


def grouped(keys: Sequence[int], members: Sequence[int], count: int) -> Groups:
    """Group members by their keys, which are numbers below `count`; the members of a group keep their order."""
    starts = array("Q", bytes(8 * (count + 1)))
    for key in keys:
        starts[key + 1] += 1
    starts = array("Q", accumulate(starts))
    filled, found = array("Q", starts), array("I", bytes(4 * len(members)))
    for key, member in zip(keys, members, strict=True):
        found[filled[key]] = member
        filled[key] += 1
    return Groups(starts, found)


class Groups(Sequence[Sequence[int]]):
    """Lists of numbers in two arrays: 4 bytes for each number, and 8 for a list."""

    __slots__ = ("_members", "_starts")

    def __init__(self, starts: array[int], members: array[int]) -> None:
        self._starts, self._members = starts, members

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Sequence[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sequence[int]]: ...
    def __getitem__(self, index: int | slice) -> Sequence[int] | list[Sequence[int]]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        return self._members[self._starts[index] : self._starts[index + 1]]
