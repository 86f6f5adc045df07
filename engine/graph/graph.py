"""The task graph: reads, nodes that compute values from them and from each other, and output tensors.

Reads and nodes are numbered, with their attributes in flat lists to save memory: a 671B mixture of experts has 90,000
output tensors, and the graph counts against the memory budget. Equal operations on equal sources are a single node
with several outputs.

A source of a node is a *value*: a read, by its number, or another node, as ``~node``. Of a node that computes several
tensors at once, the first one is the node, and each other one is a node of kind `RESULT`, which computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Any

from ...io.safetensors.dtypes import DType
from ...io.safetensors.tensors import TensorRef
from ...methods.kernel.access import ALIGNED, Access
from ...methods.kernel.kernel import Kernel
from .footprint import Footprint

Value = int
"""A source of a node: the number of a read, or ``~node``."""


class Kind(Enum):
    """How an operation computes its output."""

    COPY = "copy"  # the source's bytes, unchanged
    REQUIRE_EQUAL = "same"  # the sources' bytes, which must be equal (integer tensors)
    MERGE = "merge"  # a kernel: a method, a decoder, or several of them in one
    RESULT = "result"  # another tensor that the node before it computes


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation on the sources of a node, shared by all nodes with equal operations.

    Args:
        kind: how the output is computed.
        method: name of the merge method, for display.
        parameters: the resolved parameters as (name, value); a per-input value is a tuple.
        base: index of the base model among the sources, or None.
        positions: for each source, the index of its model in the recipe, for random keys.
        kernel: the method bound to inputs and parameters; None if the source is copied.
        copied: for each source, how the output uses its elements if nothing is computed; all `ALIGNED` if empty.
    """

    kind: Kind
    method: str
    parameters: tuple[tuple[str, Any], ...] = ()
    base: int | None = None
    positions: tuple[int, ...] = ()
    kernel: Kernel | None = None
    copied: tuple[Access, ...] = ()

    @property
    def copies_tensor(self) -> bool:
        """Whether the output is all bytes of a stored tensor, which a file system can share or copy itself."""
        return self.kind is Kind.COPY and not self.copied

    @property
    def accesses(self) -> tuple[Access, ...]:
        """For each source, how the output uses its elements; empty if all are `ALIGNED`."""
        return self.copied if self.kernel is None else self.kernel.inputs.accesses

    @property
    def passes(self) -> int:
        """Number of passes over the sources: the reductions, and the pass that computes the output."""
        return 1 if self.kernel is None else self.kernel.reductions + 1


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


class MergeGraph:
    """Reads -> nodes -> outputs. Append-only while it is built, then read-only.

    Attributes:
        reads: the source tensors, by read number.
        read_models: for each read, the index of its model in `models`.
        models: names of the input models in the recipe.
        operations: the distinct operations, by operation number.
        node_operation: for each node, its operation number.
        node_sources: for each node, the values that are its sources, in recipe order.
        node_dtype: for each node, the dtype of its output.
        node_shape: for each node, the shape of its output.
        node_key: for each node, its random key; 0 if the operation isn't random.
        outputs: the output tensors, in the order of the model.
        footprints: for each measured node, the memory of a compute thread (see `cost.measure_memory`).
    """

    def __init__(self, models: tuple[str, ...]) -> None:
        self.models = models
        self.reads: list[TensorRef] = []
        self.read_models: list[int] = []
        self.read_names: list[str] = []
        self.operations: list[Operation] = []
        self.node_operation: list[int] = []
        self.node_sources: list[tuple[Value, ...]] = []
        self.node_dtype: list[DType] = []
        self.node_shape: list[tuple[int, ...]] = []
        self.node_key: list[int] = []
        self.outputs: list[Output] = []
        self.footprints: dict[int, Footprint] = {}
        self._read_numbers: dict[tuple[int, str], int] = {}
        self._operation_numbers: dict[Operation, int] = {}
        self._node_numbers: dict[tuple[int, tuple[Value, ...], str, int], int] = {}
        self._results: dict[int, tuple[int, ...]] = {}
        self._access_numbers: dict[Access, int] = {ALIGNED: 0}
        self._operation_accesses: list[tuple[int, ...]] = []  # by operation; empty if all are aligned

    def add_read(self, model: int, name: str, ref: TensorRef) -> int:
        """Add the read of tensor `name` of a model, or find it; returns the read number."""
        number = self._read_numbers.setdefault((model, name), len(self.reads))
        if number == len(self.reads):
            self.reads.append(ref)
            self.read_models.append(model)
            self.read_names.append(name)
        return number

    def add_node(
        self,
        operation: Operation,
        sources: tuple[Value, ...],
        dtype: DType,
        key: int = 0,
        shape: tuple[int, ...] | None = None,
    ) -> int:
        """Add the node that performs `operation` on `sources`, or find an equal one; returns the node number.

        Args:
            operation: the operation.
            sources: values that it is performed on.
            dtype: dtype of the output.
            key: random key; 0 if the operation isn't random.
            shape: shape of the output; that of the first source if None.
        """
        number = self._number(operation)
        equal = (number, sources, dtype.name, key)
        node = self._node_numbers.get(equal)
        if node is None:
            node = self._node_numbers[equal] = self.append_node(operation, sources, dtype, key, shape)
        return node

    def append_node(
        self,
        operation: Operation,
        sources: tuple[Value, ...],
        dtype: DType,
        key: int = 0,
        shape: tuple[int, ...] | None = None,
    ) -> int:
        """Add a node as `add_node` does, whether or not there is an equal one.

        Raises:
            ValueError: if the output of a node is used other than element for element.
        """
        if any(v < 0 and access is not ALIGNED for v, access in zip(sources, operation.accesses, strict=False)):
            raise ValueError("the output of a node can only be used element for element")
        self.node_operation.append(self._number(operation))
        self.node_sources.append(sources)
        self.node_dtype.append(dtype)
        self.node_shape.append(self.value_shape(sources[0]) if shape is None else shape)
        self.node_key.append(key)
        return len(self.node_operation) - 1

    def _number(self, operation: Operation) -> int:
        """The number of an operation, which is added if it is new."""
        number = self._operation_numbers.setdefault(operation, len(self.operations))
        if number == len(self.operations):
            self.operations.append(operation)
            known = self._access_numbers
            self._operation_accesses.append(
                tuple(known.setdefault(access, len(known)) for access in operation.accesses)
            )
        return number

    def add_results(self, node: int, results: Iterable[tuple[DType, tuple[int, ...]]]) -> tuple[int, ...]:
        """Add the other tensors that a node computes, with their dtypes and shapes; returns their node numbers."""
        operation = Operation(Kind.RESULT, self.operation(node).method)
        numbers = []
        for place, (dtype, shape) in enumerate(results, 1):
            numbers.append(self.add_node(operation, (~node,), dtype, place, shape))
        return self.set_results(node, numbers)

    def set_results(self, node: int, others: Iterable[int]) -> tuple[int, ...]:
        """Set the nodes of kind `RESULT` that stand for the other tensors that a node computes; returns them."""
        self._results[node] = tuple(others)
        return self._results[node]

    def add_output(self, name: str, node: int, group: int, folder: str = "") -> None:
        """Add the output tensor `name` of a node, in a folder of OUT or in OUT itself."""
        self.outputs.append(Output(name, node, group, folder))

    def outputs_in(self, folder: str) -> list[int]:
        """The numbers of the outputs in a folder of OUT, or in OUT itself."""
        return [number for number, output in enumerate(self.outputs) if output.folder == folder]

    def operation(self, node: int) -> Operation:
        """The operation of a node."""
        return self.operations[self.node_operation[node]]

    def shape(self, node: int) -> tuple[int, ...]:
        """The shape of a node's output."""
        return self.node_shape[node]

    def elements(self, node: int) -> int:
        """Number of elements of a node's output."""
        return prod(self.node_shape[node])

    def nbytes(self, node: int) -> int:
        """Size of a node's output in bytes."""
        return self.node_dtype[node].nbytes(self.elements(node))

    def nodes(self) -> range:
        """All node numbers."""
        return range(len(self.node_operation))

    def tasks(self) -> list[int]:
        """The nodes that are executed: all but those of kind `RESULT`."""
        return [node for node in self.nodes() if self.operation(node).kind is not Kind.RESULT]

    def results(self, node: int) -> tuple[int, ...]:
        """The node, and the nodes of the other tensors that it computes."""
        return (node, *self._results.get(node, ()))

    def result_dtypes(self, node: int) -> tuple[DType, ...]:
        """The dtype of each tensor that a node computes."""
        return tuple([self.node_dtype[result] for result in self.results(node)])

    def results_with(self, node: int) -> tuple[int, ...]:
        """All tensors that are computed together with a node's output, that of the computing node first."""
        computing = ~self.node_sources[node][0] if self.operation(node).kind is Kind.RESULT else node
        return self.results(computing)

    def access(self, node: int, place: int) -> Access:
        """How a node's output uses the elements of the source at a place."""
        accesses = self.operation(node).accesses
        return accesses[place] if accesses else ALIGNED

    def access_numbers(self, node: int) -> tuple[int, ...]:
        """For each source of a node, the number of its access in the graph; empty if all are `ALIGNED`."""
        return self._operation_accesses[self.node_operation[node]]

    def places(self, node: int) -> tuple[int, ...]:
        """The place among a node's sources of each distinct one: sources differ in the value or in the access."""
        sources, accesses = self.node_sources[node], self.access_numbers(node)
        first: dict[object, int] = {}
        for place, value in enumerate(sources):
            first.setdefault((value, accesses[place]) if accesses else value, place)
        return tuple(first.values())

    def value_shape(self, value: Value) -> tuple[int, ...]:
        """The shape of a value."""
        return self.reads[value].shape if value >= 0 else self.node_shape[~value]

    def value_dtype(self, value: Value) -> DType:
        """The dtype in which a value is stored."""
        return self.reads[value].dtype if value >= 0 else self.node_dtype[~value]

    def value_nbytes(self, value: Value) -> int:
        """The size of a value in bytes."""
        return self.reads[value].nbytes if value >= 0 else self.nbytes(~value)

    def reads_of(self, node: int) -> tuple[int, ...]:
        """The distinct reads that a node's output is computed from, directly or through other nodes, in their order."""
        sources = self.node_sources[node]
        if all(value >= 0 for value in sources):
            return tuple(dict.fromkeys(sources))
        found: dict[int, None] = {}
        seen: set[int] = set()
        stack = list(reversed(sources))
        while stack:
            value = stack.pop()
            if value >= 0:
                found[value] = None
            elif value not in seen:
                seen.add(value)
                stack.extend(reversed(self.node_sources[~value]))
        return tuple(found)

    def destinations(self) -> list[list[int]]:
        """For each node, the numbers of its outputs."""
        outputs: list[list[int]] = [[] for _ in self.nodes()]
        for number, output in enumerate(self.outputs):
            outputs[output.node].append(number)
        return outputs

    def node_names(self) -> list[str]:
        """For each node, the label of its first output, or else of the first output that is computed from it."""
        names = [""] * len(self.node_operation)
        for output in reversed(self.outputs):
            names[output.node] = output.label
        users = self.users()
        for node in sorted(users, reverse=True):  # users without an output have higher numbers
            names[node] = names[node] or names[min(users[node])]
        return names

    def label(self, node: int) -> str:
        """The name of a node, as in `node_names`, for display. Takes time linear in the number of outputs."""
        return next((output.label for output in self.outputs if output.node == node), "") or self.node_names()[node]

    def consumers(self) -> list[list[int]]:
        """For each read, the nodes that use it themselves."""
        consumers: list[list[int]] = [[] for _ in self.reads]
        for node, sources in enumerate(self.node_sources):
            for value in dict.fromkeys(sources):
                if value >= 0:
                    consumers[value].append(node)
        return consumers

    def users(self) -> dict[int, list[int]]:
        """For each node that is a source of others, the nodes that use it, apart from those of kind `RESULT`."""
        users: dict[int, list[int]] = {}
        for node in self.nodes():
            if self.operation(node).kind is not Kind.RESULT:
                for value in dict.fromkeys(self.node_sources[node]):
                    if value < 0:
                        users.setdefault(~value, []).append(node)
        return users

    def __iter__(self) -> Iterator[int]:
        return iter(self.nodes())
