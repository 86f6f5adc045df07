"""The reads of a graph in flat arrays. Most are of tensors in a table, where they are found by their row."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, compress
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


class _Rows(NamedTuple):
    """The reads of a model's tensors, for each row of their table; -1 if there is none."""

    tensors: TensorTable
    numbers: array[int]


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
        self._by_row: dict[int, _Rows] = {}  # of models whose tensors are in a table; the others are in `_by_name`

    def find(self, model: int, name: str, ref: TensorRef) -> int:
        """Find or append the read of tensor `name` of a model; returns its number."""
        rows = self._by_row.get(model)
        row = -1 if rows is None else rows.tensors.row(name)
        number = self._by_name.get((model, name), -1) if rows is None or row < 0 else rows.numbers[row]
        if number < 0:
            number = self._add(model, name, row)
            self.append(ref)
        return number

    def find_stored(self, model: int, name: str, tensors: TensorTable) -> int:
        """Find or append the read of tensor `name` of a model that has these tensors; returns its number."""
        rows = self._rows_of(model, tensors)
        row = tensors.row(name)
        number = rows.numbers[row]
        if number < 0:
            number = self._add(model, name, row)
            self.append_stored(*tensors.place(row))
        return number

    def _add(self, model: int, name: str, row: int) -> int:
        """Add a read without its tensor; return its number."""
        number = len(self._files)
        if row < 0:
            self._by_name[model, name] = number
        else:
            self._by_row[model].numbers[row] = number
        self.models.append(model)
        self.names.append(name)
        return number

    def keep_rows(self, stored: Iterable[Mapping[str, TensorRef]]) -> None:
        """Find reads by their rows in a table from now on, if there is one, which takes less memory than by names.

        Args:
            stored: for each model, its stored tensors.
        """
        for model, tensors in enumerate(stored):
            if isinstance(tensors, TensorTable):
                self._rows_of(model, tensors)

    def _rows_of(self, model: int, tensors: TensorTable) -> _Rows:
        rows = self._by_row.get(model)
        if rows is None:
            rows = self._by_row[model] = _Rows(tensors, array("i", [-1]) * len(tensors))
        return rows

    def are_new(self, tensors: StoredTensors) -> bool:
        """Whether there are no reads of these tensors, at least one, each of which is given once."""
        numbers = self._rows_of(tensors.model, tensors.table).numbers
        return max(map(numbers.__getitem__, tensors.rows)) < 0 and len(set(tensors.rows)) == len(tensors.rows)

    def repeat(
        self, like: Sequence[int], tensors: Sequence[StoredTensors], order: Sequence[int], users: array[int]
    ) -> None:
        """Append new reads of the classes of others, before the nodes that use them.

        Args:
            like: for each new read, the other one.
            tensors: for each model, tensors of which there are no reads.
            order: for each new read, the place of its tensor among all `tensors`.
            users: for each new read, the first node with it as its first source; -1 if there is none.
        """
        begin, files, names = len(self._files), list[int](), list[str]()
        offsets, models, rows = list[int](), list[int](), list[int]()
        targets: list[array[int]] = []  # for each tensor, the numbers of its model's reads by row
        for model, table, own_names, own in tensors:
            found, places = table.places(own)
            distinct = dict(zip(map(id, found), found, strict=True))
            numbers = {address: self._file_number(file) for address, file in distinct.items()}
            files += map(numbers.__getitem__, map(id, found))
            names += own_names
            offsets += places
            models += [model] * len(own)
            targets += [self._by_row[model].numbers] * len(own)
            rows += own
        self._files.extend(map(files.__getitem__, order))
        self._offsets.extend(map(offsets.__getitem__, order))
        self.names.extend(map(names.__getitem__, order))
        self.models.extend(map(models.__getitem__, order))
        self.class_numbers.extend(array("I", map(self.class_numbers.__getitem__, like)))
        self.first_users.extend(users)
        self.used.extend(bytes(len(like)))
        for number, place in enumerate(order, begin):
            targets[place][rows[place]] = number

    def chosen(self, flags: bytearray) -> Reads:
        """The reads whose flag is 1, without users. None can be found there."""
        reads = Reads()
        reads.classes, reads.files, reads._class_of = self.classes, self.files, self._class_of
        reads._class_by_id, reads._file_of = self._class_by_id, self._file_of
        reads.class_numbers = array("I", compress(self.class_numbers, flags))
        reads._files, reads._offsets = (
            array("I", compress(self._files, flags)),
            array("Q", compress(self._offsets, flags)),
        )
        reads.models = array("H", compress(self.models, flags))
        reads.names = list(compress(self.names, flags))
        ranks = list(accumulate(flags, initial=0)) if self._others else []
        reads._others = {ranks[number]: ref for number, ref in self._others.items() if flags[number]}
        reads.first_users = array("i", [-1]) * len(reads.names)
        reads.used = bytearray(len(reads.names))
        return reads

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
