"""The task graph: reads, nodes that compute values from them and from each other, and output tensors.

Reads and nodes are numbered, with their attributes in flat lists to save memory: a 671B mixture of experts has 90,000
output tensors, and the graph counts against the memory budget. Equal operations on equal sources are a single node
with several outputs.

A source of a node is a *value*: a read, by its number, or another node, as ``~node``. Of a node that computes several
tensors at once, the first one is the node, and each other one is a node of kind `RESULT`, which computes nothing.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import compress
from math import prod
from typing import TypeVar

from ...io.tensors.dtypes import DType
from ...io.tensors.refs import TensorRef
from ...io.tensors.table import TensorTable
from ...methods.kernel.access import ALIGNED, Access
from .columns.outputs import Output, Outputs
from .columns.reads import Reads
from .columns.repeats import Repeat
from .columns.rows import Rows, grouped
from .footprint import Footprint
from .operation import Kind, Operation, dtype_of_numbers, result_of

__all__ = ["Kind", "MergeGraph", "Operation", "Output", "Value"]

T = TypeVar("T")
Value = int
"""A source of a node: the number of a read, or ``~node``."""


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
        first_users: for each node, the first node with it as its first source; -1 if there is none.
        shares_reads: whether any read is a source of several nodes.
        uses_nodes: whether any node is a source of others, apart from those of kind `RESULT`.
        outputs: the output tensors, in the order of the model.
        repeats: what was added at once, in the order of the graph (see `pieces`).
        footprints: for each measured class, the memory of a compute thread (see `cost.measure_memory`).
    """

    def __init__(self, models: tuple[str, ...], reads: Reads | None = None) -> None:
        self.models = models
        self.reads = reads or Reads()
        self.read_models, self.read_names = self.reads.models, self.reads.names
        self.operations: list[Operation] = []
        self.node_operation = array("I")
        self.node_sources = Rows()
        self.node_dtype: list[DType] = []
        self.node_shape: list[tuple[int, ...]] = []
        self.node_key = array("Q")
        self._node_class = array("I")
        self._class_nodes: list[int] = []
        self._repeated: dict[int, array[int]] = {}  # by first node, the nodes that some nodes repeat
        self.shares_reads = False
        self._class_places: list[tuple[int, ...]] = []
        self.outputs = Outputs()
        self.repeats: list[Repeat] = []
        self.footprints: dict[int, Footprint] = {}
        self._operation_numbers: dict[Operation, int] = {}
        self._operations_by_id: dict[int, int] = {}  # of those in `operations`: hashing one takes longer than all else
        self.first_users = array("i")
        self._node_numbers: dict[tuple[object, ...], int] = {}
        self._class_numbers: dict[tuple[object, ...], int] = {}
        self.uses_nodes = False
        self._users: tuple[int, Mapping[int, list[int]]] = (0, {})  # after how many nodes they were found
        self._results: dict[int, tuple[int, ...]] = {}
        self._access_numbers: dict[Access, int] = {ALIGNED: 0}
        self._operation_accesses: list[tuple[int, ...]] = []  # by operation; empty if all are aligned

    def add_read(self, model: int, name: str, ref: TensorRef) -> int:
        """Add the read of tensor `name` of a model, or find it; returns the read number."""
        return self.reads.find(model, name, ref)

    def add_stored(self, model: int, name: str, tensors: TensorTable) -> int:
        """Add the read of tensor `name` of a model that has these tensors, or find it (see `Reads.find_stored`)."""
        return self.reads.find_stored(model, name, tensors)

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
        equal = (number, sources, dtype.name, key, shape)
        # most values are the first source of one node only, so few nodes are in `_node_numbers`
        users, place = self.first_users if sources[0] < 0 else self.reads.first_users, max(sources[0], ~sources[0])
        first = users[place]
        if first < 0:
            first = users[place] = self.append_node(operation, sources, dtype, key, shape)
            return first
        found = self.node_operation[first], self.node_sources[first], self.node_dtype[first].name, self.node_key[first]
        if (*found, None if shape is None else self.node_shape[first]) == equal:
            return first
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
            ValueError: if `operation` uses the output of a node in another way than `_check_use` allows.
        """
        number = self._number(operation)
        if operation.kind is not Kind.RESULT and min(sources) < 0:
            self._check_use(operation, sources)
        shape = self.value_shape(sources[0]) if shape is None else shape
        self.node_operation.append(number)
        self.node_sources.append(sources)
        self.node_dtype.append(dtype)
        self.node_shape.append(shape)
        self.node_key.append(key)
        self.first_users.append(-1)
        used = self.reads.used
        for value in set(sources):
            if value < 0:
                self.uses_nodes |= operation.kind is not Kind.RESULT
            elif used[value]:
                self.shares_reads = True
            else:
                used[value] = 1
        return len(self.node_operation) - 1

    def counts(self) -> tuple[int, int, int]:
        """The numbers of reads, nodes and outputs."""
        return len(self.reads), len(self.node_operation), len(self.outputs)

    def repeat_nodes(self, like: array[int]) -> None:
        """Add nodes that are like others, but for their sources and first users, which the caller adds."""
        self._repeated[len(self.node_operation)] = like
        self.node_operation.extend(array("I", map(self.node_operation.__getitem__, like)))
        self.node_dtype.extend(map(self.node_dtype.__getitem__, like))
        self.node_shape.extend(map(self.node_shape.__getitem__, like))
        self.node_key.extend(array("Q", map(self.node_key.__getitem__, like)))

    def _check_use(self, operation: Operation, sources: tuple[Value, ...]) -> None:
        """Raise ValueError unless an operation computes with the first tensors of nodes, element for element."""
        for value, access in zip(sources, operation.accesses or (ALIGNED,) * len(sources), strict=True):
            known = 0 <= ~value < len(self.node_operation)
            if value < 0 and (operation.kind is not Kind.MERGE or access is not ALIGNED):
                raise ValueError("the output of a node can only be computed with, element for element")
            if known and self.operation(~value).kind is Kind.RESULT:
                raise ValueError("only the first of the tensors that a node computes can be used by others")

    @property
    def node_class(self) -> array[int]:
        """For each node, the number of its class: nodes with equal operations on values of equal dtypes and shapes.

        A mixture of experts has a dozen classes, so what depends on the class alone is computed once. The classes are
        found when they are asked for: a node can be added before those that it uses.
        """
        while (node := len(self._node_class)) < len(self.node_operation):
            if (like := self._repeated.pop(node, None)) is not None:
                self._node_class.extend(array("I", map(self._node_class.__getitem__, like)))
                continue
            sources = self.node_sources[node]
            same = tuple(map(sources.index, sources)) if len(set(sources)) < len(sources) else ()
            results = [(self.node_dtype[other].name, self.node_shape[other]) for other in self.results(node)]
            kind = (self.node_operation[node], *results, same, *map(self._class_of_value, sources))
            number = self._class_numbers.setdefault(kind, len(self._class_nodes))
            if number == len(self._class_nodes):
                self._class_nodes.append(node)
                self._class_places.append(self._find_places(node))
            self._node_class.append(number)
        return self._node_class

    @property
    def class_nodes(self) -> list[int]:
        """For each class, its first node."""
        return self._class_nodes if self.node_class else []

    def _class_of_value(self, value: Value) -> object:
        """What the values of one dtype and shape have in common."""
        return (
            self.reads.class_numbers[value] if value >= 0 else (self.node_dtype[~value].name, self.node_shape[~value])
        )

    def by_class(self, function: Callable[[int], T]) -> list[T]:
        """For each node, the value of a function that depends only on the class of a node."""
        values = [function(node) for node in self.class_nodes]
        return list(map(values.__getitem__, self.node_class))

    def total(self, function: Callable[[int], int], nodes: Iterable[int]) -> int:
        """The sum over nodes of a number that depends only on the class of a node."""
        counts = Counter(map(self.node_class.__getitem__, nodes))
        return sum(function(self.class_nodes[number]) * count for number, count in counts.items())

    def _number(self, operation: Operation) -> int:
        """The number of an operation, which is added if it is new."""
        known_number = self._operations_by_id.get(id(operation))
        if known_number is not None:
            return known_number
        number = self._operation_numbers.setdefault(operation, len(self.operations))
        if number == len(self.operations):
            self.operations.append(operation)
            known = self._access_numbers
            self._operation_accesses.append(
                tuple(known.setdefault(access, len(known)) for access in operation.accesses)
            )
            self._operations_by_id[id(operation)] = number
        return number

    def add_results(self, node: int, results: Iterable[tuple[DType, tuple[int, ...]]]) -> tuple[int, ...]:
        """Add the other tensors that a node computes, with dtypes and shapes; return their nodes. See `result_of`."""
        own = self.operation(node), self.node_shape[node]
        others = [(result_of(*own, place, s), d, place, s) for place, (d, s) in enumerate(results, 1)]
        return self.set_results(node, [self.add_node(o, (~node,), d, place, s) for o, d, place, s in others])

    def set_results(self, node: int, others: Iterable[int]) -> tuple[int, ...]:
        """Set the nodes of kind `RESULT` that stand for the other tensors that a node computes; returns them."""
        self._results[node] = tuple(others)
        if len(self._node_class) > node:  # the classes are found again
            del self._node_class[:], self._class_nodes[:], self._class_places[:]
            self._class_numbers.clear()
        return self._results[node]

    def add_output(self, name: str, node: int, group: int, folder: str = "") -> None:
        """Add the output tensor `name` of a node, in a folder of OUT or in OUT itself."""
        self.outputs.add(name, node, group, folder)

    def outputs_in(self, folder: str) -> Sequence[int]:
        """The numbers of the outputs in a folder of OUT, or in OUT itself."""
        return self.outputs.in_folder(folder)

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

    def tasks(self) -> Sequence[int]:
        """The nodes that are executed: all but those of kind `RESULT`."""
        executed = [operation.kind is not Kind.RESULT for operation in self.operations]
        if all(executed):
            return self.nodes()
        return array("I", compress(self.nodes(), map(executed.__getitem__, self.node_operation)))

    def results(self, node: int) -> tuple[int, ...]:
        """The node, and the nodes of the other tensors that it computes."""
        return (node, *self._results.get(node, ()))

    def result_dtypes(self, node: int) -> tuple[DType, ...]:
        """The dtype of the numbers of each tensor that a node computes; see `operation.dtype_of_numbers`."""
        return (self.node_dtype[node], *(dtype_of_numbers(self.node_dtype[each]) for each in self.results(node)[1:]))

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
        return self._class_places[self.node_class[node]]

    def _find_places(self, node: int) -> tuple[int, ...]:
        sources, accesses = self.node_sources[node], self.access_numbers(node)
        first: dict[object, int] = {}
        for place, value in enumerate(sources):
            first.setdefault((value, accesses[place]) if accesses else value, place)
        return tuple(first.values())

    def value_shape(self, value: Value) -> tuple[int, ...]:
        """The shape of a value."""
        return self.reads.class_of(value).shape if value >= 0 else self.node_shape[~value]

    def value_dtype(self, value: Value) -> DType:
        """The dtype in which a value is stored."""
        return self.reads.class_of(value).dtype if value >= 0 else self.node_dtype[~value]

    def value_nbytes(self, value: Value) -> int:
        """The size of a value in bytes."""
        return self.reads.class_of(value).nbytes if value >= 0 else self.nbytes(~value)

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

    def destinations(self) -> Sequence[Sequence[int]]:
        """For each node, the numbers of its outputs."""
        return grouped(self.outputs.nodes, range(len(self.outputs)), len(self.node_operation))

    def node_names(self) -> list[str]:
        """For each node, the label of its first output, or else of the first output that is computed from it."""
        names = [""] * len(self.node_operation)
        for number in reversed(range(len(self.outputs))):
            names[self.outputs.nodes[number]] = self.outputs.label(number)
        users = self.users()
        for node in sorted(users, reverse=True):  # users without an output have higher numbers
            names[node] = names[node] or names[min(users[node])]
        return names

    def label(self, node: int) -> str:
        """The name of a node, as in `node_names`, for display. Takes time linear in the number of outputs."""
        try:
            return self.outputs.label(self.outputs.nodes.index(node))
        except ValueError:
            return self.node_names()[node]

    def consumers(self) -> Sequence[Sequence[int]]:
        """For each read, the nodes that use it themselves."""
        reads, nodes = array("I"), array("I")
        for node, sources in enumerate(self.node_sources):
            for value in dict.fromkeys(sources):
                if value >= 0:
                    reads.append(value)
                    nodes.append(node)
        return grouped(reads, nodes, len(self.reads))

    def users(self) -> Mapping[int, list[int]]:
        """For each node that is a source of others, the nodes that use it, apart from those of kind `RESULT`."""
        if self._users[0] != len(self.node_operation):
            self._users = len(self.node_operation), self.users_among(self.nodes() if self.uses_nodes else ())
        return self._users[1]

    def users_among(self, nodes: Iterable[int]) -> dict[int, list[int]]:
        """As `users`, but only those that are among some nodes."""
        users: dict[int, list[int]] = {}
        for node in nodes:
            if self.operation(node).kind is not Kind.RESULT:
                for value in dict.fromkeys(self.node_sources[node]):
                    if value < 0:
                        users.setdefault(~value, []).append(node)
        return users

    def __iter__(self) -> Iterator[int]:
        return iter(self.nodes())
