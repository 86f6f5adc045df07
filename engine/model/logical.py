"""Logical tensors: what methods, layers, filters and reports see of a checkpoint, however its values are stored.

Most tensors are stored as they are. A quantized tensor is stored in parts, such as codes and scales, from which a
decoder computes its values; a tensor of fused experts is a slice of a larger one. A `Format` recognizes such tensors in
a checkpoint. The parts are not tensors of the model, so nothing but the reads of the merge names them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ...io.safetensors.checkpoint import Checkpoint
from ...io.safetensors.dtypes import DType
from ...io.safetensors.tensors import TensorRef
from ...methods.kernel.access import ALIGNED, Access, Shape
from ...methods.kernel.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor that a value is computed from.

    Args:
        name: name of the stored tensor.
        ref: the stored tensor.
        access: which of its elements a range of the value's elements needs.
    """

    name: str
    ref: TensorRef
    access: Access = ALIGNED


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
class LogicalTensor:
    """A value of a model: what a method merges.

    Args:
        name: name of the tensor in the model's architecture.
        shape: shape of the value.
        dtype: nominal dtype: what the value would be stored as without a format of its own.
        parts: the stored tensors.
        decode: how the value is computed from them; None if the staged bytes of the only part are the value.
    """

    name: str
    shape: Shape
    dtype: DType
    parts: tuple[Part, ...]
    decode: Decode | None = None

    @property
    def stored(self) -> TensorRef | None:
        """The stored tensor, if the value is just that."""
        part = self.parts[0]
        return part.ref if self.decode is None and part.access is ALIGNED else None

    @property
    def nbytes(self) -> int:
        """Size in bytes of all stored parts."""
        return sum(part.ref.nbytes for part in self.parts)


class LogicalTensors(Mapping[str, LogicalTensor]):
    """The logical tensors of a model by name, in the order of their first parts in the files.

    Args:
        stored: the stored tensors by name.
        found: the tensors that are not just stored tensors. Their parts are none of the model's tensors.
    """

    __slots__ = ("_found", "_names", "_stored")

    def __init__(self, stored: Mapping[str, TensorRef], found: Iterable[LogicalTensor] = ()) -> None:
        self._stored = stored
        self._found = {tensor.name: tensor for tensor in found}
        self._names: Mapping[str, object] = stored
        if self._found:
            first: dict[str, list[str]] = {}  # by stored tensor, the tensors whose first part it is
            for tensor in self._found.values():
                for number, part in enumerate(tensor.parts):
                    first.setdefault(part.name, [])
                    if number == 0:
                        first[part.name].append(tensor.name)
            self._names = dict.fromkeys(name for each in stored for name in first.get(each, [each]))

    @property
    def all_stored(self) -> bool:
        """Whether every tensor is stored as it is."""
        return not self._found

    def __getitem__(self, name: str) -> LogicalTensor:
        found = self._found.get(name)
        if found is not None:
            return found
        if name not in self._names:
            raise KeyError(name)
        ref = self._stored[name]
        return LogicalTensor(name, ref.shape, ref.dtype, (Part(name, ref),))

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


Format = Callable[[Checkpoint], Iterable[LogicalTensor]]
"""A function that finds the tensors of a format in a checkpoint: first by its config.json, then by their names."""

FORMATS: dict[str, Format] = {}
"""The known formats by name."""


def logical_tensors(checkpoint: Checkpoint) -> LogicalTensors:
    """Return the logical tensors of a checkpoint.

    Raises:
        CheckpointError: a tensor is of a format that is recognized, but its parts don't fit together.
    """
    return LogicalTensors(checkpoint.tensors, [tensor for find in FORMATS.values() for tensor in find(checkpoint)])
