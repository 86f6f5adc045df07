"""Logical tensors: what methods, layers, filters and reports see of a checkpoint, however its values are stored.

Most tensors are stored as they are. A quantized tensor is stored in parts, such as codes and scales, from which a
decoder computes its values; a tensor of fused experts is a slice of a larger one. `formats` recognizes such tensors in
a checkpoint. The parts are not tensors of the model, so nothing but the reads of the merge names them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import copy
from itertools import compress
from typing import NamedTuple

from ...io.tensors.refs import TensorClass, TensorRef
from ...io.tensors.table import TensorTable
from ...methods.kernel.access import Shape
from .values.columns import Another, Values
from .values.value import Decode, Encoding, LogicalTensor, Part

__all__ = ["ArrangedTensors", "Decode", "Encoding", "LogicalTensor", "LogicalTensors", "Part", "StoredRows", "Tensors"]
__all__ += ["class_counts", "codes_of", "format_of", "kind_of", "label_of", "part_names", "shape_of"]


class StoredRows(NamedTuple):
    """Where the parts of some tensors are in a table.

    Args:
        classes: the class of each tensor: a negative number for values, or else that of the stored tensor in the table;
            None for values with parts elsewhere.
        rows: rows of all parts, one tensor after another, but for those of such values.
        firsts: for each tensor, the number of the row of its first part.
    """

    classes: list[int | None]
    rows: list[int]
    firsts: list[int]


class LogicalTensors(Mapping[str, "TensorRef | LogicalTensor"]):
    """The tensors of a model by name, in the order of their first parts in the files.

    A value takes a few bytes next to its name. A `LogicalTensor` is made when one is asked for.

    Args:
        stored: the stored tensors by name.
        found: the values that are not just stored tensors. Their parts are none of the model's tensors, unless they
            have the value's name. Values without parts of the model itself replace the tensor of their name, or come
            last.

    Attributes:
        table: the stored tensors, if they are in a table; else None.
    """

    def __init__(self, stored: Mapping[str, TensorRef], found: Iterable[LogicalTensor | Another]) -> None:
        self.table = stored if isinstance(stored, TensorTable) else None
        values = Values(stored)
        for each in found:
            values.add(each)
        last = {name: number for number, name in enumerate(values.names)}
        if len(last) < len(values.names):  # of those with the same name, the last one counts
            given, values = values, Values(stored)
            for number in last.values():
                values.add(given.value(number))
        self._values = values
        self._length = sum(1 for _ in self)

    def shares_names(self, other: LogicalTensors) -> bool:
        """Whether `seen_in` made one of them from the other, so they have the same names in the same order."""
        return self._values.names is other._values.names

    def seen_in(self, stored: Mapping[str, TensorRef]) -> LogicalTensors | None:
        """Return the same values of another checkpoint's tensors, with which they share all but the places in files.

        None if the stored tensors are not in tables of the same names, dtypes and shapes, or a value has other parts.
        """
        if self.table is None or not isinstance(stored, TensorTable) or self._values.elsewhere:
            return None
        if not stored.is_like(self.table):
            return None
        seen = copy(self)
        seen.table, seen._values = stored, self._values.seen_in(stored)
        return seen

    @property
    def parts(self) -> Collection[str]:
        """The names of the stored tensors that are parts of a value, or belong to one."""
        pairs = zip(self._values.stored_names, self._values.by_row, strict=True)
        return {name for name, number in pairs if number >= 0}

    @property
    def codes(self) -> dict[str, str]:
        """The stored tensors that are parts of a quantized value or belong to it, each with the name of its format."""
        codes, formats = {}, self._values.by_class(lambda like: like.stored_format if like.quantized else None)
        for row, (name, first) in enumerate(zip(self._values.stored_names, self._values.by_row, strict=True)):
            for number in self._values.sharing.get(row, (first,)) if first >= 0 else ():
                if (form := formats[self._values.class_number(number)]) is not None:
                    codes[name] = form
        return codes

    def format_of(self, part: str) -> str:
        """Return the format of the quantized value that a stored tensor is a part of; empty if there is none."""
        likes = map(self._values.like, self._values.having(self._values.row(part)))
        return next((like.stored_format for like in likes if like.quantized), "")

    @property
    def quantized(self) -> Iterator[str]:
        """The names of the quantized values."""
        return compress(self._values.names, self._values.of_classes(lambda like: like.quantized))

    def counts_of(self, part: str) -> tuple[int, int] | None:
        """Return the number of values that a part of a decoded value stands for, and their number of elements.

        They are the values whose first part it is: none for scales. The result is None for another tensor.
        """
        row, count, elements, decoded = self._values.row(part), 0, 0, False
        for number in self._values.having(row):
            if (like := self._values.like(number)).decode is not None:
                decoded = True
                if self._values.first_row(number) == row:
                    count, elements = count + 1, elements + like.elements
        return (count, elements) if decoded else None

    def values_of(self, part: str) -> list[str]:
        """Return the names of the values that a stored tensor is a part of."""
        return [self._values.names[number] for number in self._values.having(self._values.row(part))]

    def with_values(self, found: Iterable[LogicalTensor]) -> LogicalTensors:
        """Return the tensors with other values in the place of some."""
        known = map(self._values.value, range(len(self._values.names)))
        return LogicalTensors(self._values.stored, [*known, *found])

    def class_of(self, name: str) -> TensorClass | TensorRef | LogicalTensor:
        """Return what a tensor has in common with others: its dtype and shape, or any value of its class.

        Raises KeyError.
        """
        number = self._values.number(name)
        if number >= 0:
            return self._values.like(number)
        return self[name] if self.table is None else self.table.class_of(self._plain(name))

    def counts(self) -> Iterator[tuple[TensorClass | TensorRef | LogicalTensor, int]]:
        """The classes as `class_of` returns them, each with a number of tensors; a class can be there several times."""
        values = self._values
        yield from ((values.like(number), count) for number, count in values.counts())
        rows = [
            row
            for row, number in enumerate(values.by_row)
            if number < 0 and values.number(values.stored_names[row]) < 0
        ]
        if self.table is None:
            yield from ((self[values.stored_names[row]], 1) for row in rows)
        else:
            found = Counter(self.table.class_numbers(rows))
            yield from ((self.table.classes[number], count) for number, count in found.items())

    def stored_rows(self, names: Iterable[str]) -> StoredRows | None:
        """Return where the parts of some tensors are in the table; None if there is no table."""
        values, found = self._values, StoredRows([], [], [])
        if self.table is None:
            return None
        for name in names:
            number = values.number(name)
            found.firsts.append(len(found.rows))
            if number in values.elsewhere:
                found.classes.append(None)
            elif number < 0:
                found.rows.append(self.table.row(self._plain(name)))
                found.classes.extend(self.table.class_numbers(found.rows[-1:]))
            else:
                found.rows.extend(values.rows(number))
                found.classes.append(~values.class_number(number))
        return found

    def _plain(self, name: str) -> str:
        """The name of a tensor that is stored as it is. Raises KeyError for other names."""
        row = self._values.row(name)
        if row < 0 or self._values.by_row[row] >= 0:
            raise KeyError(name)
        return name

    def __getitem__(self, name: str) -> TensorRef | LogicalTensor:
        number = self._values.number(name)
        return self._values.value(number) if number >= 0 else self._values.stored[self._plain(name)]

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        row = self._values.row(name)
        return self._values.number(name) >= 0 or (row >= 0 and self._values.by_row[row] < 0)

    def __iter__(self) -> Iterator[str]:
        values = self._values
        for row, (name, number) in enumerate(zip(values.stored_names, values.by_row, strict=True)):
            if number < 0:
                own = values.number(name)
                if own < 0 or values.first_row(own) < 0:  # stored as it is, or another model's tensor
                    yield name
            elif values.is_first[row] and row in values.sharing:
                yield from [values.names[each] for each in values.sharing[row] if values.first_row(each) == row]
            elif values.is_first[row]:
                yield values.names[number]
        yield from (values.names[each] for each in values.elsewhere if self._is_added(each))

    def __len__(self) -> int:
        return self._length

    def _is_added(self, number: int) -> bool:
        """Whether a value has no part of the model itself, and no stored tensor has its name."""
        return self._values.first_row(number) < 0 and self._values.row(self._values.names[number]) < 0


class ArrangedTensors(dict[str, TensorRef]):
    """The tensors of a stage's output, or of a checkpoint that is seen in another layout than it is stored in.

    Attributes:
        found: the values that have some of them as parts.
    """

    found: tuple[LogicalTensor, ...] = ()


Tensors = Mapping[str, TensorRef] | LogicalTensors
"""The tensors of a model: all of them stored as they are, or some of them computed from parts."""


def kind_of(tensors: Tensors, name: str) -> TensorClass | TensorRef | LogicalTensor:
    """Return the dtype and the shape of a tensor, without making a reference if it is in a table. Raises KeyError."""
    if isinstance(tensors, TensorTable):
        return tensors.class_of(name)
    found = tensors.class_of(name) if isinstance(tensors, LogicalTensors) else None
    return tensors[name] if found is None or isinstance(found, LogicalTensor) else found


def shape_of(tensors: Tensors, name: str) -> Shape:
    """Return the shape of a tensor without making a value. Raises KeyError."""
    return (tensors.class_of(name) if isinstance(tensors, LogicalTensors) else kind_of(tensors, name)).shape


def class_counts(tensors: Tensors) -> Iterable[tuple[TensorClass | TensorRef | LogicalTensor, int]]:
    """Return what some tensors have in common, with their number: all tensors are counted, and none is made."""
    if isinstance(tensors, TensorTable | LogicalTensors):
        return tensors.counts()
    return ((ref, 1) for ref in tensors.values())


def label_of(tensor: TensorClass | TensorRef | LogicalTensor) -> str:
    """Return the dtype of a tensor for display, with the format that its values are decoded from."""
    return tensor.label if isinstance(tensor, LogicalTensor) else tensor.dtype.name


def part_names(tensors: Tensors, name: str) -> tuple[str, ...]:
    """Return the names of the model's own stored tensors that a tensor is computed from."""
    tensor = tensors[name] if isinstance(tensors, LogicalTensors) else None
    return tuple([part.name for part in tensor.own_parts]) if isinstance(tensor, LogicalTensor) else (name,)


def format_of(tensors: Tensors, part: str) -> str:
    """Return the format of the quantized value that a stored tensor is a part of; empty if there is none."""
    return tensors.format_of(part) if isinstance(tensors, LogicalTensors) else ""


def codes_of(tensors: Tensors) -> Mapping[str, str]:
    """Return the stored tensors of quantized values in known formats, each with the name of its format."""
    return tensors.codes if isinstance(tensors, LogicalTensors) else {}
