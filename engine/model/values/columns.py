"""The values of a checkpoint in columns: a giant has 50,000 of them, but only a handful of classes."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import NamedTuple, TypeVar

from ....io.tensors.refs import TensorRef
from ....io.tensors.table import TensorTable
from .value import LogicalTensor, Part

T = TypeVar("T")


class Another(NamedTuple):
    """A value that differs from another one of the same checkpoint only in its name and those of its parts.

    Args:
        like: the other value.
        name: name of the value.
        parts: names of its parts, then of its companions.
    """

    like: LogicalTensor
    name: str
    parts: tuple[str, ...]


class Values:
    """Values with their parts. A class is stored as one of its values, any other value as its name and a few integers.

    Args:
        stored: the stored tensors by name.

    Attributes:
        stored_names: name of each stored tensor, by row.
        names: name of each value, by number.
        by_row: for each stored tensor, the first value that it is a part of; -1 if there is none.
        is_first: for each stored tensor, whether it is the first part of a value: 0 or 1.
        sharing: for each row of a stored tensor that is a part of several values, all of them.
        elsewhere: values with parts that are not stored tensors as they are, by number.
    """

    def __init__(self, stored: Mapping[str, TensorRef]) -> None:
        self.stored = stored
        self.stored_names = stored.names if isinstance(stored, TensorTable) else list(stored)
        rows = {} if isinstance(stored, TensorTable) else {name: row for row, name in enumerate(stored)}
        self.row = stored.row if isinstance(stored, TensorTable) else lambda name: rows.get(name, -1)
        self.names: list[str] = []
        self.by_row = array("i", [-1]) * len(self.stored_names)
        self.is_first = bytearray(len(self.stored_names))
        self.sharing: dict[int, list[int]] = {}
        self.elsewhere: dict[int, LogicalTensor] = {}
        self._numbers: dict[str, int] = {}  # of the values that `by_row` does not have for the tensor of their name
        self._likes: list[LogicalTensor] = []  # one value of each class
        self._class_numbers: dict[Hashable, int] = {}
        self._members = array("I")  # the number of each value's class
        self._rows, self._ends = array("i"), array("I", [0])  # rows of the parts and companions; -1 if elsewhere

    def seen_in(self, stored: TensorTable) -> Values:
        """Return the values that have the same parts in another table, which `is_like` this one."""
        other = copy(self)
        other.stored, other.stored_names, other.row = stored, stored.names, stored.row
        return other

    def add(self, found: LogicalTensor | Another) -> None:
        """Add a value, with a name that no other one has."""
        number = len(self.names)
        names = found.parts if isinstance(found, Another) else tuple([part.name for part in found.all_parts])
        rows = list(map(self.row, names))
        if not isinstance(found, Another) and not all(map(self._is_stored, found.all_parts)):
            self.elsewhere[number] = found
            rows = [row if part.owner is None else -1 for row, part in zip(rows, found.all_parts, strict=True)]
        self.names.append(found.name)
        self._members.append(self._class_of(found, names))
        self._rows.extend(rows)
        self._ends.append(len(self._rows))
        for row in dict.fromkeys(row for row in rows if row >= 0):
            if self.by_row[row] < 0:
                self.by_row[row] = number
            else:
                self.sharing.setdefault(row, [self.by_row[row]]).append(number)
        if rows[0] >= 0:
            self.is_first[rows[0]] = 1
        own = self.row(found.name)
        if own < 0 or self.by_row[own] != number:
            self._numbers[found.name] = number

    def _is_stored(self, part: Part) -> bool:
        """Whether a part is the stored tensor of its name."""
        return part.owner is None and self.stored.get(part.name) == part.as_stored

    def _class_of(self, found: LogicalTensor | Another, parts: Sequence[str]) -> int:
        """The number of a value's class. Besides what values have in common, it has the ends of their names."""
        start = found.name.rpartition(".")[0]
        ends = tuple([name.removeprefix(start) for name in (found.name, *parts)])
        like = found.like if isinstance(found, Another) else found
        number = self._class_numbers.get((id(like), ends))  # hashing what they have in common takes longer
        if number is None:
            uses = [(each.access, each.ref.dtype, each.ref.shape, each.stored is None) for each in like.all_parts]
            common = like.shape, like.dtype, like.decode, like.encoding, len(like.parts), *uses
            number = self._class_numbers.setdefault((common, ends), len(self._likes))
            if number == len(self._likes):
                self._likes.append(like)
                self._class_numbers[id(like), ends] = number  # it stays, so no other one gets its address
        return number

    def number(self, name: str) -> int:
        """The number of a value; -1 if there is none of this name."""
        number = self._numbers.get(name, -1)
        if number >= 0:
            return number
        row = self.row(name)
        found = self.by_row[row] if row >= 0 else -1
        return found if found >= 0 and self.names[found] == name else -1

    def like(self, number: int) -> LogicalTensor:
        """A value of the class of a value."""
        return self.elsewhere.get(number) or self._likes[self._members[number]]

    def by_class(self, function: Callable[[LogicalTensor], T]) -> list[T]:
        """For each class, the result of a function that depends only on the class of a value."""
        return list(map(function, self._likes))

    def of_classes(self, function: Callable[[LogicalTensor], T]) -> Iterator[T]:
        """For each value, the result of a function that depends only on its class."""
        return map(self.by_class(function).__getitem__, self._members)

    def counts(self) -> Iterable[tuple[int, int]]:
        """A value of each class, and the number of values in it."""
        first = dict(zip(reversed(self._members), reversed(range(len(self._members))), strict=True))
        return ((first[number], count) for number, count in Counter(self._members).items())

    def class_number(self, number: int) -> int:
        """The number of the class of a value."""
        return self._members[number]

    def rows(self, number: int) -> Sequence[int]:
        """The rows of a value's parts and companions; -1 for those that are elsewhere."""
        return self._rows[self._ends[number] : self._ends[number + 1]]

    def first_row(self, number: int) -> int:
        """The row of the first part of a value."""
        return self._rows[self._ends[number]]

    def having(self, row: int) -> Sequence[int]:
        """The values that a stored tensor is a part of."""
        number = self.by_row[row] if row >= 0 else -1
        return self.sharing.get(row) or ((number,) if number >= 0 else ())

    def value(self, number: int) -> LogicalTensor:
        """Make a value."""
        if number in self.elsewhere:
            return self.elsewhere[number]
        like, parts = self._likes[self._members[number]], []
        for part, row in zip(like.all_parts, self.rows(number), strict=True):
            name = self.stored_names[row]
            ref = self.stored[name]
            seen = ref if part.stored is None else replace(ref, dtype=part.ref.dtype, shape=part.ref.shape)
            parts.append(replace(part, name=name, ref=seen, stored=None if part.stored is None else ref))
        own, others = tuple(parts[: len(like.parts)]), tuple(parts[len(like.parts) :])
        return replace(like, name=self.names[number], parts=own, companions=others)
