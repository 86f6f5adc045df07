"""A value of a model, and the stored tensors that it is computed from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from ....io.tensors.dtypes import DType
from ....io.tensors.refs import TensorRef
from ....methods.kernel.access import ALIGNED, Access, BlockRows, FactorAccess, Shape, TransposedSlice
from ....methods.kernel.decoder import Decoder
from ...recipe.entries.block_format import BlockFormat
from ...recipe.types import ModelReference


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
        if isinstance(self.access, FactorAccess):  # may stage those of other values, too
            count = prod(shape[:-2]) * prod(self.access.size(shape, self.ref.shape))
        elif count and not isinstance(self.access, TransposedSlice):  # stages what lies between its elements, too
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
        scales: dtype of the scales in a header: F32, BF16, F8_E8M0, or U8 for the exponents of powers of 2.
        power_of_two: whether scales of other dtypes are powers of 2, too.
    """

    blocks: BlockRows
    scales: DType
    power_of_two: bool = False

    @classmethod
    def of(cls, form: BlockFormat) -> Encoding:
        """The encoding of a format that a recipe asks for."""
        return cls(BlockRows(form.rows, form.columns), form.scales)

    @staticmethod
    def names(name: str) -> tuple[str, str]:
        """The names that codes and scales of a tensor have in this format: those of DeepSeek-V3."""
        return name, f"{name}_scale_inv"


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
    def stored_format(self) -> str:
        """Name of the format of the model's own parts, without what adapters add."""
        return self.format.partition(" + ")[0]

    @property
    def all_parts(self) -> tuple[Part, ...]:
        """The parts and the companions."""
        return self.parts + self.companions

    @property
    def decoded(self) -> bool:
        """Whether a decoder computes the value."""
        return self.decode is not None

    @property
    def quantized(self) -> bool:
        """Whether the value is stored as codes, and not as a floating-point number of 16 bits or more."""
        return self.decode is not None and not self.parts[0].ref.dtype.is_wide_float

    @property
    def adapted(self) -> bool:
        """Whether parts are other models' tensors, so no stored tensors of the model itself are the value."""
        return any(part.owner is not None for part in self.parts)

    @property
    def own_parts(self) -> tuple[Part, ...]:
        """The stored tensors that the model itself has."""
        return tuple([part for part in self.parts if part.owner is None])

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
        return sum(part.bytes_of(self.shape) for part in self.all_parts)

    @property
    def own_bytes(self) -> int:
        """Those that the model itself has, without the parts of adapters."""
        return sum(part.bytes_of(self.shape) for part in self.all_parts if part.owner is None)

    @property
    def label(self) -> str:
        """The nominal dtype, with the format if the value is decoded."""
        return self.dtype.name if self.decode is None else f"{self.dtype.name} ({self.format})"
