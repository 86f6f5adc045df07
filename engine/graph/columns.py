"""Attributes of reads, nodes and outputs in flat arrays: a list of objects takes several times as much memory.

A graph of 250,000 nodes counts against the memory budget of its merge. Objects are made when they are asked for.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar, overload

from ...io.tensors.refs import TensorClass, TensorRef
from ...io.tensors.table import TensorTable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the output model.

    Args:
        name: name of the tensor.
        node: the node that computes the tensor.
        group: group of tensors that keep the order of their source in the layout, such as a slice of the recipe.
        folder: folder of the tensor's model in OUT: the name of a saved stage, or empty.
    """

    name: str
    node: int
    group: int
    folder: str = ""

    @property
    def label(self) -> str:
        """The unique name of the output: the tensor's name, with the folder as a prefix."""
        return f"{self.folder}/{self.name}" if self.folder else self.name


class Outputs(Sequence[Output]):
    """The outputs of a graph: 16 bytes for each, besides its name.

    Attributes:
        names: names of the tensors.
        nodes: nodes that compute them.
    """

    __slots__ = ("_folders", "_groups", "names", "nodes")

    def __init__(self) -> None:
        self.names: list[str] = []
        self.nodes = array("I")
        self._groups = array("I")
        self._folders: list[tuple[int, str]] = []  # the first output of each run of outputs in one folder

    def add(self, name: str, node: int, group: int, folder: str) -> None:
        """Append an output; see `Output`."""
        if not self._folders or self._folders[-1][1] != folder:
            self._folders.append((len(self.names), folder))
        self.names.append(name)
        self.nodes.append(node)
        self._groups.append(group)

    def extend(self, names: Sequence[str], nodes: Sequence[int], group: int, folder: str = "") -> None:
        """Append the outputs of several nodes, at least one."""
        self.add(names[0], nodes[0], group, folder)
        self.names.extend(names[1:])
        self.nodes.extend(nodes[1:])
        self._groups.extend([group] * (len(names) - 1))

    def label(self, number: int) -> str:
        """The label of an output."""
        if len(self._folders) == 1 and not self._folders[0][1]:
            return self.names[number]
        return self._output(number).label

    def of_nodes(self, values: Sequence[T]) -> Iterator[T]:
        """For each output, the value of its node.

        Args:
            values: the value of each node.
        """
        return map(values.__getitem__, self.nodes)

    def in_folder(self, folder: str) -> Sequence[int]:
        """The numbers of the outputs in a folder."""
        if [folder] == [name for _, name in self._folders]:
            return range(len(self.names))
        bounds = pairwise([*(first for first, _ in self._folders), len(self.names)])
        runs = zip(self._folders, bounds, strict=True)
        return list(chain.from_iterable(range(*run) for (_, name), run in runs if name == folder))

    @property
    def folders(self) -> list[str]:
        """The folders, each once."""
        return list(dict.fromkeys(folder for _, folder in self._folders))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Output]:
        return map(self._output, range(len(self.names)))

    @overload
    def __getitem__(self, index: int) -> Output: ...
    @overload
    def __getitem__(self, index: slice) -> list[Output]: ...
    def __getitem__(self, index: int | slice) -> Output | list[Output]:
        numbers = range(len(self.names))[index]
        return self._output(numbers) if isinstance(numbers, int) else list(map(self._output, numbers))

    def _output(self, number: int) -> Output:
        folder = next(folder for first, folder in reversed(self._folders) if first <= number)
        return Output(self.names[number], self.nodes[number], self._groups[number], folder)


class StoredTensors(NamedTuple):
    """Some tensors of one model.

    Args:
        model: number of the model.
        table: all tensors of the model.
        names: names of the tensors.
        rows: positions of the tensors in the table.
    """

    model: int
    table: TensorTable
    names: Sequence[str]
    rows: Sequence[int]


class Reads(Sequence[TensorRef]):
    """The references of a graph's reads: 27 bytes for each.

    Attributes:
        classes: classes of the tensors, each once.
        class_numbers: for each read, the number of its class.
        files: files of the tensors, each once.
        models: for each read, the number of its model.
        names: for each read, the name of its tensor.
        first_users: for each read, the first node with it as its first source; -1 if there is none.
        used: for each read, whether a node uses it: 0 or 1.
    """

    __slots__ = (
        "_by_name", "_by_row", "_class_by_id", "_class_of", "_file_of", "_files", "_last", "_offsets", "_others",
        "class_numbers", "classes", "files", "first_users", "models", "names", "used",
    )  # fmt: skip

    def __init__(self) -> None:
        self.classes: list[TensorClass] = []
        self.class_numbers = array("I")
        self.files: list[Path] = []
        self._class_of: dict[tuple[str, tuple[int, ...]], int] = {}
        self._class_by_id: dict[int, int] = {}  # of those in `classes`
        self._file_of: dict[Path, int] = {}
        self._last: tuple[Path | None, int] = None, -1  # the file that was added or found last
        self._files = array("I")
        self._offsets = array("Q")
        self._others: dict[int, TensorRef] = {}  # references of other types, by number
        self.models = array("H")
        self.names: list[str] = []
        self.first_users = array("i")
        self.used = bytearray()
        self._by_name: dict[tuple[int, str], int] = {}
        self._by_row: dict[int, array[int]] = {}  # for each model and row of its table, the read; -1 if it has none

    def find(self, model: int, name: str, ref: TensorRef) -> int:
        """Find or append the read of tensor `name` of a model; returns its number."""
        number = self._by_name.setdefault((model, name), len(self._files))
        if number == len(self._files):
            self.append(ref)
            self.models.append(model)
            self.names.append(name)
        return number

    def find_stored(self, model: int, name: str, tensors: TensorTable) -> int:
        """Find or append the read of tensor `name` of a model that has these tensors; returns its number.

        Of one model, the reads of all tensors are found in this way, or none of them.
        """
        numbers = self._numbers_of(model, tensors)
        row = tensors.row(name)
        number = numbers[row]
        if number < 0:
            number = numbers[row] = len(self._files)
            self.append_stored(*tensors.place(row))
            self.models.append(model)
            self.names.append(name)
        return number

    def _numbers_of(self, model: int, tensors: TensorTable) -> array[int]:
        numbers = self._by_row.get(model)
        if numbers is None:
            numbers = self._by_row[model] = array("i", [-1]) * len(tensors)
        return numbers

    def are_new(self, tensors: StoredTensors) -> bool:
        """Whether there are no reads of these tensors."""
        return max(map(self._numbers_of(tensors.model, tensors.table).__getitem__, tensors.rows)) < 0

    def repeat(self, like: Iterable[int], tensors: Sequence[StoredTensors], node: int) -> None:
        """Append new reads, those of the first tensor of each model together; each node uses such a group.

        Args:
            like: reads of earlier tensors of the first model, each followed by the other models' reads. The new tensors
                are of their classes.
            tensors: for each model, its tensors.
            node: number of the node that uses the first reads.
        """
        begin, width, count = len(self._files), len(tensors), len(tensors) * len(tensors[0].rows)
        names, files, offsets, models, classes = [""] * count, [0] * count, [0] * count, [0] * count, [0] * count
        alike = list(like)
        for place, (model, table, own_names, rows) in enumerate(tensors):
            found, offsets[place::width] = table.places(rows)
            distinct = dict(zip(map(id, found), found, strict=True))
            numbers = {address: self._file_number(file) for address, file in distinct.items()}
            files[place::width] = map(numbers.__getitem__, map(id, found))
            names[place::width] = own_names
            models[place::width] = [model] * len(rows)
            classes[place::width] = [self.class_numbers[read + place] for read in alike]
            numbers_by_row = self._by_row[model]
            for row, number in zip(rows, range(begin + place, begin + count, width), strict=True):
                numbers_by_row[row] = number
        self._files.extend(files)
        self._offsets.extend(offsets)
        self.names.extend(names)
        self.models.extend(models)
        self.class_numbers.extend(classes)
        self.first_users.extend([-1] * count)
        self.first_users[begin::width] = array("i", range(node, node + len(tensors[0].rows)))
        self.used.extend(b"" * count)

    def append(self, ref: TensorRef) -> None:
        """Append a reference."""
        if type(ref) is not TensorRef:
            self._others[len(self._files)] = ref
        self.append_stored(ref.file, ref.offset, TensorClass(ref.dtype, ref.shape, ref.nbytes))

    def append_stored(self, file: Path, offset: int, found: TensorClass) -> None:
        """Append the reference of a tensor of a class."""
        number = self._class_by_id.get(id(found))
        if number is None:
            number = self._class_of.setdefault((found.dtype.name, found.shape), len(self.classes))
            if number == len(self.classes):
                self.classes.append(found)
                self._class_by_id[id(found)] = number
        self.class_numbers.append(number)
        self._files.append(self._file_number(file))
        self._offsets.append(offset)
        self.first_users.append(-1)
        self.used.append(0)

    def _file_number(self, file: Path) -> int:
        if file is self._last[0]:  # hashing a path takes longer
            return self._last[1]
        number = self._file_of.setdefault(file, len(self.files))
        if number == len(self.files):
            self.files.append(file)
        self._last = file, number
        return number

    def class_of(self, number: int) -> TensorClass:
        """The class of a read's tensor."""
        return self.classes[self.class_numbers[number]]

    def places(self) -> tuple[array[int], array[int]]:
        """For each read, the number of its file and the offset in it in bytes."""
        return self._files, self._offsets

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[TensorRef]:
        return map(self._ref, range(len(self._files)))

    @overload
    def __getitem__(self, index: int) -> TensorRef: ...
    @overload
    def __getitem__(self, index: slice) -> list[TensorRef]: ...
    def __getitem__(self, index: int | slice) -> TensorRef | list[TensorRef]:
        numbers = range(len(self._files))[index]
        return self._ref(numbers) if isinstance(numbers, int) else list(map(self._ref, numbers))

    def _ref(self, number: int) -> TensorRef:
        if number in self._others:
            return self._others[number]
        found = self.classes[self.class_numbers[number]]
        file = self.files[self._files[number]]
        return TensorRef(file, self._offsets[number], found.nbytes, found.dtype, found.shape)


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

    def extend(self, first: int, width: int, count: int) -> None:
        """Append `count` tuples of `width` consecutive integers, which continue from tuple to tuple."""
        end = len(self.values)
        self.values.extend(range(first, first + width * count))
        self._ends.extend(range(end + width, end + width * count + 1, width))

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
