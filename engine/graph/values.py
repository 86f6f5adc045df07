"""Adds the values of a model's tensors to a graph: reads, or nodes that compute them from their parts."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import NamedTuple

from ...io.tensors.dtypes import F32, F64
from ...io.tensors.refs import TensorClass, TensorRef
from ...io.tensors.table import TensorTable
from ...methods.kernel.method import Method
from ...methods.kernel.spec import InputSpec
from ..model.inputs import Model
from ..model.logical import Encoding, LogicalTensor, Part
from ..recipe.types import ModelReference
from .graph import Kind, MergeGraph, Operation, Value


@dataclass(frozen=True, slots=True)
class CopiedValue:
    """A value of the output whose parts are copied, so its own numbers are nowhere.

    Args:
        name: name of the value in the output.
        tensor: the value in the input.
        parts: name of each part in the output.
    """

    name: str
    tensor: LogicalTensor
    parts: tuple[str, ...]

    def tensor_of(self, tensors: Mapping[str, TensorRef]) -> LogicalTensor:
        """Return the value of an output that stores these tensors."""
        own = (*self.tensor.parts, *self.tensor.companions)
        moved = tuple(_moved(part, name, tensors[name]) for part, name in zip(own, self.parts, strict=True))
        count = len(self.tensor.parts)
        return replace(self.tensor, name=self.name, parts=moved[:count], companions=moved[count:])


def _moved(part: Part, name: str, stored: TensorRef) -> Part:
    """Return a part that is stored elsewhere, under another name."""
    ref = replace(stored, dtype=part.ref.dtype, shape=part.ref.shape)
    return replace(part, name=name, ref=ref, stored=None if part.stored is None else stored)


class Input(NamedTuple):
    """The tensor of one source of a slice."""

    source: int
    model: Model
    name: str
    kind: TensorClass | TensorRef | LogicalTensor

    @property
    def decoded(self) -> bool:
        """Whether the values are computed from several stored tensors."""
        return isinstance(self.kind, LogicalTensor) and self.kind.decoded

    @property
    def adapted(self) -> bool:
        """Whether parts are another model's, so the value is stored nowhere."""
        return isinstance(self.kind, LogicalTensor) and self.kind.adapted

    @property
    def encoding(self) -> Encoding | None:
        """How other values are stored in the tensor's format; None if they can't be, or it has none."""
        return self.kind.encoding if isinstance(self.kind, LogicalTensor) else None

    def stored_like(self, other: Input) -> bool:
        """Whether the tensor is stored like another one in a format that is written, with similar names and shapes."""
        if self.encoding is None or self.encoding != other.encoding:
            return False
        assert isinstance(self.kind, LogicalTensor)
        assert isinstance(other.kind, LogicalTensor)
        parts = [(renamed(part.name, self.name, other.name), part.as_stored.shape) for part in self.kind.own_parts]
        return parts == [(part.name, part.as_stored.shape) for part in other.kind.own_parts]

    def stored_as(self, encoding: Encoding | None) -> bool:
        """Whether the tensor is stored in an encoding, under the names of the encoding's tensors and without others."""
        if encoding is None or self.encoding != encoding:
            return False
        assert isinstance(self.kind, LogicalTensor)
        return (
            tuple(part.name for part in self.kind.own_parts) == Encoding.names(self.name) and not self.kind.companions
        )

    @property
    def ref(self) -> TensorRef:
        """The reference of the tensor, which is stored as it is."""
        tensor = self.model.tensors[self.name]
        assert isinstance(tensor, TensorRef)
        return tensor


class TensorValues:
    """The values of tensors in a graph.

    Args:
        graph: the graph that receives them.
        passthrough: the method that returns its input.
        owners: numbers of the models by reference; those without adapters have the stored tensors.
    """

    def __init__(self, graph: MergeGraph, passthrough: Method, owners: Mapping[ModelReference, int]) -> None:
        self._graph = graph
        self._passthrough = passthrough
        self._owners = owners
        self._operations: dict[Hashable, Operation] = {}

    def value(self, model: Model, name: str) -> Value:
        """Add the value of a model's tensor."""
        tensors, number = model.tensors, self.number(model)
        if isinstance(tensors, TensorTable):
            return self._graph.add_stored(number, name, tensors)
        tensor = tensors[name]
        if not isinstance(tensor, LogicalTensor):
            return self._graph.add_read(number, name, tensor)
        return ~self.computed(number, tensor)

    def number(self, model: Model) -> int:
        """Return the number of the model whose files have a model's stored tensors: itself, or its base."""
        return model.number if model.has_files else self._owners[model.reference.base]

    def read(self, model: int, part: Part) -> int:
        """Add the read of a part of a value whose own parts the model with this number has."""
        owner = model if part.owner is None else self._owners[part.owner]
        return self._graph.add_read(owner, part.name, part.ref)

    def computed(self, model: int, tensor: LogicalTensor) -> int:
        """Add the node that computes a value from its parts, in the work dtype.

        Args:
            model: number of the model that has the value's own parts.
            tensor: the value.
        """
        reads = tuple(self.read(model, part) for part in tensor.parts)
        wide = any(part.ref.dtype == F64 for part in tensor.parts)
        return self._graph.add_node(self._decoding(tensor), reads, F64 if wide else F32, shape=tensor.shape)

    def picked(self, model: int, tensor: LogicalTensor) -> int:
        """Add the node of a value whose elements are elements of its only part, in their order: it copies them."""
        (part,) = tensor.parts
        read = self.read(model, part)
        copy = Operation(Kind.COPY, "passthrough", copied=(part.access,))
        return self._graph.add_node(copy, (read,), part.ref.dtype, shape=tensor.shape)

    def copies(self, model: Model, name: str, output: str) -> Iterator[tuple[str, int]]:
        """Add nodes that copy what a tensor is stored as; yield the name of each tensor of the output, and its node.

        Args:
            model: the model.
            name: name of the tensor.
            output: name of the tensor in the output; those of its parts differ in the same way.
        """
        tensor = model.tensors[name]
        if not isinstance(tensor, LogicalTensor):
            read = self.value(model, name)
            yield output, self._graph.add_node(Operation(Kind.COPY, "passthrough"), (read,), tensor.dtype)
            return
        if tensor.picked:
            yield output, self.picked(self.number(model), tensor)
            return
        for part in tensor.parts + tensor.companions:
            read = self.read(self.number(model), part)
            if tensor.decode is not None:
                copy, stored = Operation(Kind.COPY, "passthrough"), part.as_stored
                node = self._graph.add_node(copy, (read,), stored.dtype, shape=stored.shape)
                yield renamed(part.name, name, output), node
            else:
                node = self._graph.add_node(self._decoding(tensor), (read,), part.ref.dtype, shape=tensor.shape)
                yield output, node

    def _decoding(self, tensor: LogicalTensor) -> Operation:
        """The operation that computes a value from its parts, shared by equal ones."""
        decode, accesses = tensor.decode, tuple(part.access for part in tensor.parts)
        parts = tuple(part.ref.shape for part in tensor.parts)
        key = (decode, tensor.shape, accesses, parts)
        known = self._operations.get(key)
        if known is None:
            inputs = InputSpec(len(parts), None, tensor.shape, accesses, parts)
            if decode is None:
                kernel, name = self._passthrough.kernel(inputs, {}), "passthrough"
            else:
                kernel, name = decode.decoder.kernel(inputs, dict(decode.parameters)), decode.decoder.name
            given = () if decode is None else decode.parameters
            known = self._operations[key] = Operation(Kind.MERGE, name, given, kernel=kernel)
        return known


def renamed(part: str, name: str, output: str) -> str:
    """Return the name of a part in the output, where the tensor `name` that it belongs to is `output`.

    A stack gives layers other numbers: the part of ``layers.3.w`` named ``layers.3.w_scale`` becomes that of
    ``layers.7.w``, ``layers.7.w_scale``.
    """
    ends = zip(reversed(name), reversed(output), strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    before, after = name[: len(name) - same], output[: len(output) - same]
    return after + part[len(before) :] if part.startswith(before) else part
