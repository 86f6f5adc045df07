"""The merge graph: reads, operations on them, and the output tensors that they make.

Reads and operations are numbered, with their attributes in flat lists: a 671B mixture of experts has 90,000 output
tensors, and what the graph takes counts against the memory budget. Equal operations on equal sources are one node,
with as many outputs as want it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ...io.safetensors.dtypes import DType
from ...io.safetensors.tensors import TensorRef
from ...methods.kernel.contract import Kernel
from .footprint import Footprint


class Kind(Enum):
    """How an operation's output comes about."""

    COPY = "copy"  # the source's bytes, unchanged
    REQUIRE_EQUAL = "same"  # the sources' bytes, which must be equal (integer tensors)
    MERGE = "merge"  # a method's kernel


@dataclass(frozen=True, slots=True)
class Operation:
    """What a node does with its sources; shared by all nodes that do the same.

    Args:
        kind: how the output comes about.
        method: the merge method's name, for people.
        parameters: the resolved parameters, (name, value) each; a per-input value is a tuple.
        base: which source is the base model's, or None.
        positions: the place in the recipe of each source's model, for random keys.
        kernel: the method bound to these, or None where there is nothing to compute.
    """

    kind: Kind
    method: str
    parameters: tuple[tuple[str, Any], ...] = ()
    base: int | None = None
    positions: tuple[int, ...] = ()
    kernel: Kernel | None = None

    @property
    def passes(self) -> int:
        """How often the sources are gone through: the reductions, and the pass that makes the output."""
        return 1 if self.kernel is None else self.kernel.reductions + 1


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the output model.

    Args:
        name: its name.
        node: the node that makes it.
        group: the slice of the recipe that it belongs to; tensors of one group keep their source's order in the layout.
        folder: the folder of OUT that the tensor's model lies in: the name of a stage that is saved, or empty.
    """

    name: str
    node: int
    group: int
    folder: str = ""

    @property
    def label(self) -> str:
        """What tells it from all other outputs: its name, in a folder with the folder before it."""
        return f"{self.folder}/{self.name}" if self.folder else self.name


class MergeGraph:
    """Reads -> nodes -> outputs. Built once, front to back, and then only read.

    Attributes:
        reads: the source tensors, by read number.
        read_models: the model (an index into `models`) of each read.
        models: what the recipe calls the input models.
        operations: by operation number.
        node_operation: the operation number of each node.
        node_sources: the read numbers of each node, in recipe order.
        node_dtype: the element type that each node's output is rounded to.
        node_key: the random key of each node, 0 where its operation isn't random.
        outputs: the output tensors, in the order of the model.
        footprints: the memory of a compute thread at each node that was measured: see `footprint.measure_footprints`.
    """

    def __init__(self, models: tuple[str, ...]) -> None:
        self.models = models
        self.reads: list[TensorRef] = []
        self.read_models: list[int] = []
        self.read_names: list[str] = []
        self.operations: list[Operation] = []
        self.node_operation: list[int] = []
        self.node_sources: list[tuple[int, ...]] = []
        self.node_dtype: list[DType] = []
        self.node_key: list[int] = []
        self.outputs: list[Output] = []
        self.footprints: dict[int, Footprint] = {}
        self._read_numbers: dict[tuple[int, str], int] = {}
        self._operation_numbers: dict[Operation, int] = {}
        self._node_numbers: dict[tuple[int, tuple[int, ...], str, int], int] = {}

    def add_read(self, model: int, name: str, ref: TensorRef) -> int:
        """The number of the read of tensor `name` of model number `model`."""
        number = self._read_numbers.setdefault((model, name), len(self.reads))
        if number == len(self.reads):
            self.reads.append(ref)
            self.read_models.append(model)
            self.read_names.append(name)
        return number

    def add_node(self, operation: Operation, sources: tuple[int, ...], dtype: DType, key: int = 0) -> int:
        """The number of the node that does `operation` on `sources`; an equal one that is there already is reused."""
        number = self._operation_numbers.setdefault(operation, len(self.operations))
        if number == len(self.operations):
            self.operations.append(operation)
        node = self._node_numbers.setdefault((number, sources, dtype.name, key), len(self.node_operation))
        if node == len(self.node_operation):
            self.node_operation.append(number)
            self.node_sources.append(sources)
            self.node_dtype.append(dtype)
            self.node_key.append(key)
        return node

    def add_output(self, name: str, node: int, group: int, folder: str = "") -> None:
        """Let `node` make the output tensor `name`, in a folder of OUT or in OUT itself."""
        self.outputs.append(Output(name, node, group, folder))

    def outputs_in(self, folder: str) -> list[int]:
        """The numbers of the outputs in a folder of OUT, or in OUT itself."""
        return [number for number, output in enumerate(self.outputs) if output.folder == folder]

    def operation(self, node: int) -> Operation:
        """What a node does."""
        return self.operations[self.node_operation[node]]

    def shape(self, node: int) -> tuple[int, ...]:
        """The shape of a node's output, which all its sources have."""
        return self.reads[self.node_sources[node][0]].shape

    def elements(self, node: int) -> int:
        """Elements of a node's output."""
        return self.reads[self.node_sources[node][0]].elements

    def nbytes(self, node: int) -> int:
        """Bytes of a node's output."""
        return self.node_dtype[node].nbytes(self.elements(node))

    def nodes(self) -> range:
        """Every node's number."""
        return range(len(self.node_operation))

    def destinations(self) -> list[list[int]]:
        """For each node, the numbers of the outputs that it makes."""
        found: list[list[int]] = [[] for _ in self.nodes()]
        for number, output in enumerate(self.outputs):
            found[output.node].append(number)
        return found

    def label(self, node: int) -> str:
        """What the first of a node's output tensors is called among people. Looks through all outputs."""
        return next(output.label for output in self.outputs if output.node == node)

    def consumers(self) -> list[list[int]]:
        """For each read, the nodes that need it."""
        found: list[list[int]] = [[] for _ in self.reads]
        for node, sources in enumerate(self.node_sources):
            for read in dict.fromkeys(sources):
                found[read].append(node)
        return found

    def __iter__(self) -> Iterator[int]:
        return iter(self.nodes())
