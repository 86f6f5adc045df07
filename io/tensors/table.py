"""The tensors of a checkpoint in columns.

A checkpoint has up to millions of tensors, but only a handful of classes of them. So a table stores a few bytes for
each tensor next to its name, and makes a `TensorRef` when one is asked for.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, ItemsView, Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from itertools import groupby, islice
from operator import is_
from pathlib import Path
from sys import intern
from typing import TypeVar

from .refs import TensorClass, TensorRef

_AT_ONCE = 512

T = TypeVar("T")


class TensorTable(Mapping[str, TensorRef]):
    """Stored tensors by name, those of a file together: about 170 bytes for each, most of them its name.

    Attributes:
        classes: the classes of the tensors, each once.
    """

    __slots__ = ("_components", "_files", "_firsts", "_members", "_names", "_numbers", "_offsets", "_rows", "classes")

    def __init__(self) -> None:
        self.classes: list[TensorClass] = []
        self._numbers: dict[TensorClass, int] = {}
        self._rows: dict[str, int] = {}
        self._members = array("I")  # the number of each tensor's class
        self._offsets = array("Q")
        self._files: list[Path] = []
        self._firsts: list[int] = []  # the first row of each file
        self._components: set[str] = set()  # see `components`; empty until it is called
        self._names: list[str] = []  # see `names`

    @classmethod
    def of(cls, tensors: Mapping[str, TensorRef]) -> TensorTable:
        """Make a table of references; those of a file must be consecutive."""
        table = cls()
        for file, group in groupby(tensors.items(), lambda item: item[1].file):
            names, refs = zip(*group, strict=True)
            classes = [TensorClass(ref.dtype, ref.shape, ref.nbytes) for ref in refs]
            table.add(file, tuple(map(intern, names)), classes, [ref.offset for ref in refs])
        return table

    def add(self, file: Path, names: Collection[str], classes: Sequence[TensorClass], offsets: Iterable[int]) -> None:
        """Add tensors of one file, with names that the table doesn't have.

        Args:
            file: the safetensors file.
            names: the names, interned.
            classes: the class of each tensor.
            offsets: the position of each tensor's first byte in the file, in bytes.
        """
        first = len(self._rows)
        if not self._files or self._files[-1] != file:
            self._files.append(file)
            self._firsts.append(first)
        self._rows.update(zip(names, range(first, first + len(names)), strict=True))
        self._offsets.extend(offsets)
        # equal classes are nearly always the same object, and comparing addresses is faster
        distinct = dict(zip(map(id, classes), classes, strict=True))
        numbers = {address: self._number(each) for address, each in distinct.items()}
        self._members.extend(map(numbers.__getitem__, map(id, classes)))

    def renamed(self, names: Iterable[str]) -> TensorTable:
        """Make a table of the same tensors with other names, which are unique and in the order of the rows."""
        table = TensorTable()
        table.classes, table._numbers, table._members, table._offsets = (
            self.classes,
            self._numbers,
            self._members,
            self._offsets,
        )
        table._files, table._firsts = self._files, self._firsts
        table._rows = {intern(name): row for row, name in enumerate(names)}
        return table

    def isdisjoint(self, names: Iterable[str]) -> bool:
        """Whether the table has none of these names."""
        return self._rows.keys().isdisjoint(names)

    def share_names(self, other: TensorTable) -> None:
        """Store the rows of the names once if another table has the same ones; neither table may change afterwards.

        The names themselves are interned, so they are in memory once in any case.
        """
        if len(self) == len(other) and all(map(is_, self._rows, other._rows)):
            self._rows, self._components, self._names = other._rows, other._components, other._names

    def shares_names(self, other: TensorTable) -> bool:
        """Whether `share_names` found that two tables have the same names in the same order."""
        return self._rows is other._rows

    def is_like(self, other: TensorTable) -> bool:
        """Whether two tables share names, and tensors of the same name have the same dtype and shape."""
        return self.shares_names(other) and self.classes == other.classes and self._members == other._members

    def class_of(self, name: str) -> TensorClass:
        """The class of a tensor. Raises KeyError."""
        return self.classes[self._members[self._rows[name]]]

    def described(self, wanted: Callable[[TensorClass], bool]) -> Iterator[tuple[str, TensorClass]]:
        """The names and classes of the tensors whose class is wanted."""
        chosen = {number: each for number, each in enumerate(self.classes) if wanted(each)}
        if chosen:
            for name, number in zip(self._rows, self._members, strict=True):
                if number in chosen:
                    yield name, chosen[number]

    def counts(self) -> list[tuple[TensorClass, int]]:
        """The classes with the number of tensors in each."""
        return [(self.classes[number], count) for number, count in Counter(self._members).items()]

    def refs(self) -> Iterator[TensorRef]:
        """The references of all tensors."""
        for index, (file, first) in enumerate(zip(self._files, self._firsts, strict=True)):
            end = self._firsts[index + 1] if index + 1 < len(self._firsts) else len(self._rows)
            for row in range(first, end):
                found = self.classes[self._members[row]]
                yield TensorRef(file, self._offsets[row], found.nbytes, found.dtype, found.shape)

    @property
    def names(self) -> Sequence[str]:
        """The name of each row; listed when it is asked for, once for tables that share names."""
        if len(self._names) < len(self._rows):
            self._names[:] = self._rows
        return self._names

    def row(self, name: str) -> int:
        """The position of a tensor in the table; -1 if it has no tensor of this name."""
        return self._rows.get(name, -1)

    def place(self, row: int) -> tuple[Path, int, TensorClass]:
        """The file of the tensor at a position, its offset there in bytes, and its class."""
        return self._files[bisect_right(self._firsts, row) - 1], self._offsets[row], self.classes[self._members[row]]

    def rows(self, names: Iterable[str]) -> list[int]:
        """The positions of tensors in the table. Raises KeyError."""
        return list(map(self._rows.__getitem__, names))

    def class_numbers(self, rows: Iterable[int]) -> Iterator[int]:
        """For each position, the index of the tensor's class in `classes`."""
        return map(self._members.__getitem__, rows)

    def places(self, rows: Sequence[int]) -> tuple[list[Path], list[int]]:
        """For each position, at least one, the file of the tensor and its offset there in bytes."""
        offsets = list(map(self._offsets.__getitem__, rows))
        first, last = (bisect_right(self._firsts, row) - 1 for row in (min(rows), max(rows)))
        if first == last:
            return [self._files[first]] * len(rows), offsets
        return [self._files[bisect_right(self._firsts, row) - 1] for row in rows], offsets

    def items(self) -> ItemsView[str, TensorRef]:
        """The names with their references."""
        return _Items(self)

    def values(self) -> ValuesView[TensorRef]:
        """The references."""
        return _Values(self)

    def __getitem__(self, name: str) -> TensorRef:
        file, offset, found = self.place(self._rows[name])
        return TensorRef(file, offset, found.nbytes, found.dtype, found.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        """One line with the numbers of tensors and files."""
        return f"<TensorTable: {len(self):,} tensors in {len(self._files):,} files>"

    def _number(self, found: TensorClass) -> int:
        """The number of a class, which is added if it is new."""
        number = self._numbers.setdefault(found, len(self.classes))
        if number == len(self.classes):
            self.classes.append(found)
        return number


class _Items(ItemsView[str, TensorRef]):
    _mapping: TensorTable

    def __iter__(self) -> Iterator[tuple[str, TensorRef]]:
        return zip(self._mapping, self._mapping.refs(), strict=True)


class _Values(ValuesView[TensorRef]):
    _mapping: TensorTable

    def __iter__(self) -> Iterator[TensorRef]:
        return self._mapping.refs()


class NameSet:
    """Names of which most are in a table: one byte for each that is.

    Args:
        tensors: the tensors with most of the names; nothing is saved unless they are in a table.
    """

    __slots__ = ("_added", "_others", "_tensors")

    def __init__(self, tensors: Mapping[str, TensorRef]) -> None:
        self._tensors = tensors if isinstance(tensors, TensorTable) else TensorTable()
        self._added = bytearray(len(self._tensors))  # by row
        self._others: set[str] = set()

    def add(self, name: str) -> bool:
        """Add a name; returns whether it is new."""
        row = self._tensors.row(name)
        if row < 0:
            new = name not in self._others
            self._others.add(name)
            return new
        new = not self._added[row]
        self._added[row] = 1
        return new

    def add_all(self, names: Collection[str]) -> bool:
        """Add names, which are different, if all of them are new; returns whether they are."""
        rows = list(map(self._tensors.row, names))
        others = [name for name, row in zip(names, rows, strict=True) if row < 0] if -1 in rows else []
        if any(self._added[row] for row in rows if row >= 0) or not self._others.isdisjoint(others):
            return False
        for row in rows:
            if row >= 0:
                self._added[row] = 1
        self._others.update(others)
        return True


def described(
    tensors: Mapping[str, TensorRef], wanted: Callable[[TensorClass | TensorRef], bool]
) -> Iterator[tuple[str, TensorClass | TensorRef]]:
    """The names, dtypes and shapes of the tensors whose class is wanted.

    Args:
        tensors: all tensors; in a table, only classes are looked at, and no reference is made.
        wanted: decides by dtype and shape only.
    """
    if isinstance(tensors, TensorTable):
        return tensors.described(wanted)
    return ((name, ref) for name, ref in tensors.items() if wanted(ref))


def components(tensors: Mapping[str, TensorRef]) -> Set[str]:
    """The components of all names, which dots separate; found once for tables that share names."""
    if not isinstance(tensors, TensorTable):
        return _components(tensors)
    if not tensors._components:
        tensors._components.update(_components(tensors))
    return tensors._components


def _components(names: Iterable[str]) -> set[str]:
    """The components of names. Many names are split at once, which is faster."""
    found: set[str] = set()
    remaining = iter(names)
    while some := tuple(islice(remaining, _AT_ONCE)):
        found.update(".".join(some).split("."))
    return found


def class_of(tensors: Mapping[str, TensorRef], name: str) -> TensorClass | TensorRef:
    """The dtype and the shape of a tensor, without making a reference if it is in a table. Raises KeyError."""
    return tensors.class_of(name) if isinstance(tensors, TensorTable) else tensors[name]


def total_bytes(tensors: Mapping[str, TensorRef]) -> int:
    """The size of all tensors in bytes."""
    if isinstance(tensors, TensorTable):
        return sum(found.nbytes * count for found, count in tensors.counts())
    return sum(ref.nbytes for ref in tensors.values())
