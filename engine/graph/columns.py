"""Attributes of reads, nodes and outputs in flat arrays: a list of objects takes several times as much memory.

A graph of 250,000 nodes counts against the memory budget of its merge. Objects are made when they are asked for.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import TypeVar, overload

from ...io.tensors.refs import TensorClass, TensorRef

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


class Reads(Sequence[TensorRef]):
    """The references of a graph's reads: 16 bytes for each.

    Attributes:
        classes: classes of the tensors, each once.
        class_numbers: for each read, the number of its class.
        files: files of the tensors, each once.
    """

    __slots__ = (
        "_class_by_id",
        "_class_of",
        "_file_of",
        "_files",
        "_offsets",
        "_others",
        "class_numbers",
        "classes",
        "files",
    )

    def __init__(self) -> None:
        self.classes: list[TensorClass] = []
        self.class_numbers = array("I")
        self.files: list[Path] = []
        self._class_of: dict[tuple[str, tuple[int, ...]], int] = {}
        self._class_by_id: dict[int, int] = {}  # of those in `classes`
        self._file_of: dict[Path, int] = {}
        self._files = array("I")
        self._offsets = array("Q")
        self._others: dict[int, TensorRef] = {}  # references of other types, by number

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
        file_number = self._file_of.setdefault(file, len(self.files))
        if file_number == len(self.files):
            self.files.append(file)
        self.class_numbers.append(number)
        self._files.append(file_number)
        self._offsets.append(offset)

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

    def length(self, index: int) -> int:
        """The length of a tuple."""
        return self._ends[index + 1] - self._ends[index]

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
        return self._row(index if index >= 0 else len(self) + index)

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
