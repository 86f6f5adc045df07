"""The reads of a graph in flat arrays. Most are of tensors in a table, where they are found by their row."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

from ....io.tensors.refs import TensorClass, TensorRef
from ....io.tensors.table import TensorTable


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
