"""Logical tensors: what methods, layers, filters and reports see of a checkpoint, however its values are stored.

Most tensors are stored as they are. A quantized tensor is stored in parts, such as codes and scales, from which a
decoder computes its values; a tensor of fused experts is a slice of a larger one. `formats` recognizes such tensors in
a checkpoint. The parts are not tensors of the model, so nothing but the reads of the merge names them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from ...io.tensors.dtypes import DType, Kind
from ...io.tensors.refs import TensorClass, TensorRef
from ...io.tensors.table import TensorTable
from ...methods.kernel.access import ALIGNED, Access, BlockRows, Shape, TransposedSlice
from ...methods.kernel.decoder import Decoder
from ..recipe.types import ModelReference


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor that a value is computed from.

    Args:
        name: name of the stored tensor.
        ref: the stored tensor.
        access: which of its elements a range of the value's elements needs.
        stored: the same tensor with the dtype and shape of its header, if `ref` has others of the same size: packed
            codes are bytes, and the only scale of a tensor is a matrix.
        owner: the model that has the tensor, if it is another than that of the value, such as an adapter.
    """

    name: str
    ref: TensorRef
    access: Access = ALIGNED
    stored: TensorRef | None = None
    owner: ModelReference | None = None

    @classmethod
    def seen_as(cls, name: str, stored: TensorRef, access: Access, shape: Shape, dtype: DType | None = None) -> Part:
        """A stored tensor whose bytes are read as another shape, or dtype of another width."""
        ref = replace(stored, shape=shape, dtype=dtype or stored.dtype)
        return cls(name, ref, access, None if ref == stored else stored)

    @property
    def as_stored(self) -> TensorRef:
        """The tensor as its header describes it."""
        return self.ref if self.stored is None else self.stored

    def bytes_of(self, shape: Shape) -> int:
        """Return the bytes of the part that a value of this shape is computed from, at most."""
        count = prod(shape)
        if count and not isinstance(self.access, TransposedSlice):  # stages what lies between its elements, too
            count = self.access.most(shape, self.ref.shape, count)
        return self.ref.dtype.nbytes(min(count, self.ref.elements))


@dataclass(frozen=True, slots=True)
class Decode:
    """How a value is computed from its parts.

    Args:
        decoder: function from the parts to the value.
        parameters: numbers that the format or the adapter gives, as (name, value).
    """

    decoder: Decoder
    parameters: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Encoding:
    """How values are stored as FP8 blocks: F8_E4M3 codes, and a scale for each block.

    Args:
        blocks: rows and columns of a block.
        scales: dtype of the scales: F32, BF16 or F8_E8M0.
        power_of_two: whether scales of other dtypes than F8_E8M0 are powers of 2, too.
    """

    blocks: BlockRows
    scales: DType
    power_of_two: bool = False


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A value of a model: what a method merges.

    Args:
        name: name of the tensor in the model's architecture.
        shape: shape of the value.
        dtype: nominal dtype: what the value would be stored as without a format of its own.
        parts: the stored tensors.
        decode: how the value is computed from them; None if the staged bytes of the only part are the value.
        companions: stored tensors that belong to the parts without being part of the value, such as the scales of
            activations. They are copied with the parts, and dropped if the value is computed.
        encoding: how other values are stored in the same format; None if they can't be.
    """

    name: str
    shape: Shape
    dtype: DType
    parts: tuple[Part, ...]
    decode: Decode | None = None
    companions: tuple[Part, ...] = ()
    encoding: Encoding | None = None

    @property
    def format(self) -> str:
        """Name of the format, for display."""
        return "slice" if self.decode is None else self.decode.decoder.name

    @property
    def decoded(self) -> bool:
        """Whether a decoder computes the value."""
        return self.decode is not None

    @property
    def quantized(self) -> bool:
        """Whether the value is stored as codes, and not as a floating-point number of 16 bits or more."""
        dtype = self.parts[0].ref.dtype
        return self.decode is not None and (dtype.kind is not Kind.FLOAT or dtype.bits < 16)

    @property
    def picked(self) -> bool:
        """Whether its elements are elements of the only part, in their order: nothing has to be computed."""
        return self.decode is None and self.parts[0].access.aligned

    @property
    def elements(self) -> int:
        """Number of elements of the value."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the value in its nominal dtype, in bytes."""
        return self.dtype.nbytes(self.elements)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the parts that the value is computed from; those of a slice's other values are left out."""
        return sum(part.bytes_of(self.shape) for part in self.parts + self.companions)

    @property
    def label(self) -> str:
        """The nominal dtype, with the format if the value is decoded."""
        return self.dtype.name if self.decode is None else f"{self.dtype.name} ({self.format})"


class LogicalTensors(Mapping[str, "TensorRef | LogicalTensor"]):
    """The tensors of a model by name, in the order of their first parts in the files.

    Args:
        stored: the stored tensors by name.
        found: the values that are not just stored tensors. Their parts are none of the model's tensors.

    Attributes:
        parts: names of the stored tensors that are parts of a value.
        codes: names of those that are parts of a quantized value or belong to it, each with the name of its format.
    """

    def __init__(self, stored: Mapping[str, TensorRef], found: Iterable[LogicalTensor]) -> None:
        self._stored = stored
        self._found = {tensor.name: tensor for tensor in found}
        self.codes: dict[str, str] = {}
        first: dict[str, list[str]] = {}  # by stored tensor, the values whose first part it is
        for tensor in self._found.values():
            for number, part in enumerate(tensor.parts + tensor.companions):
                first.setdefault(part.name, []).extend([tensor.name] if number == 0 else [])
                if tensor.quantized:
                    self.codes[part.name] = tensor.format
        self.parts: Collection[str] = first.keys()
        self._names = dict.fromkeys(name for each in stored for name in first.get(each, [each]))

    def elements_of_parts(self) -> dict[str, int]:
        """Return for each part of a decoded value the elements that it stands for: those of the value, or 0.

        Those of a value are counted for its first part.
        """
        elements: dict[str, int] = {}
        for tensor in self._found.values():
            for number, part in enumerate(tensor.parts + tensor.companions if tensor.decode is not None else ()):
                elements[part.name] = elements.get(part.name, 0) + (tensor.elements if number == 0 else 0)
        return elements

    def values_of_parts(self) -> dict[str, list[str]]:
        """Return for each stored tensor that is a part the names of the values that are computed from it."""
        values: dict[str, list[str]] = {}
        for tensor in self._found.values():
            for part in tensor.parts + tensor.companions:
                values.setdefault(part.name, []).append(tensor.name)
        return values

    def __getitem__(self, name: str) -> TensorRef | LogicalTensor:
        found = self._found.get(name)
        if found is not None:
            return found
        if name not in self._names:
            raise KeyError(name)
        return self._stored[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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
    return tensors.class_of(name) if isinstance(tensors, TensorTable) else tensors[name]


def label_of(tensor: TensorClass | TensorRef | LogicalTensor) -> str:
    """Return the dtype of a tensor for display, with the format that its values are decoded from."""
    return tensor.label if isinstance(tensor, LogicalTensor) else tensor.dtype.name


def part_names(tensors: Tensors, name: str) -> tuple[str, ...]:
    """Return the names of the stored tensors that a tensor is computed from."""
    tensor = tensors[name] if isinstance(tensors, LogicalTensors) else None
    return tuple([part.name for part in tensor.parts]) if isinstance(tensor, LogicalTensor) else (name,)


def codes_of(tensors: Tensors) -> Mapping[str, str]:
    """Return the stored tensors of quantized values in known formats, each with the name of its format."""
    return tensors.codes if isinstance(tensors, LogicalTensors) else {}
