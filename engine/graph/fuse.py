"""Fuses a task graph: a node is computed within the kernel of the node that uses it, or once for all that do.

A node that one other node uses becomes a part of that node's kernel, so its values never leave the registers. A node
that several use is computed once, and its output stays in RAM until they have used it, unless computing it again is
cheaper. Whatever is chosen, the bytes of the output are the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import accumulate

from ...io.tensors.dtypes import F64, DType
from ...methods.kernel.access import ALIGNED, Access
from ...methods.kernel.composition import Composition, Part
from ...methods.kernel.spec import InputSpec
from .columns.repeats import Piece, Repeat
from .graph import Kind, MergeGraph, Operation, Value
from .pieces import Pieces, independent, not_repeated

Leaf = tuple[Value, Access]


def fuse(graph: MergeGraph, *, inline: bool = False) -> MergeGraph:
    """Return a graph with the same outputs, without the nodes that become a part of others.

    The nodes of outputs have the lowest numbers, in the same order whether or not `inline` is set: the journal of a
    merge names them, and the merge may be resumed with another budget.

    Args:
        graph: graph to fuse; each node has a higher number than those that it uses.
        inline: whether every node without an output becomes a part of others: then no intermediate tensor takes RAM.
    """
    if not graph.uses_nodes:
        return graph
    repeats = independent(graph)
    nodes = not_repeated(len(graph.node_operation), [each.nodes for each in repeats])
    kept = set() if inline else _kept(graph, nodes, _output_nodes(graph, repeats))
    if any(not kept.isdisjoint(piece.nodes) for each in repeats for piece in each.likes):
        repeats, nodes = (), list(graph.nodes())
        kept = _kept(graph, nodes, _output_nodes(graph, ()))
    return _Fusion(graph, kept, repeats, graph.users_among(nodes)).fused()


def _output_nodes(graph: MergeGraph, repeats: Sequence[Repeat]) -> set[int]:
    """Return the nodes of the outputs, but for those of pieces that repeat others."""
    numbers = not_repeated(len(graph.outputs), [each.outputs for each in repeats])
    return {graph.outputs.nodes[number] for number in numbers}


# ------------------------------------------------------------------------------------------------ what is kept


def _kept(graph: MergeGraph, nodes: Sequence[int], outputs: Set[int]) -> set[int]:
    """Return the nodes whose output is computed once and kept for all nodes that use it.

    Args:
        graph: the graph.
        nodes: the nodes to decide about, in order; nothing else uses them.
        outputs: those of them that are outputs.
    """
    users, wide = _users_of(graph, nodes, outputs), _wide(graph, nodes, outputs)
    kept: set[int] = set()
    kernel: dict[int, int] = {}  # the node whose kernel a node becomes a part of; -1 for several
    reduced: set[int] = set()  # nodes over which a kernel that they become a part of reduces
    below_wide: set[int] = set()  # nodes that a float64 kernel uses, directly or not
    for node in reversed(nodes):
        mine = users.get(node, [])
        below_wide |= {node} if any(user in wide or user in below_wide for user in mine) else set()
        kernels = {kernel[user] for user in mine}
        kernel[node] = kernels.pop() if len(kernels) == 1 else -1
        reduced |= {node} if any(_reductions(graph, user) or user in reduced for user in mine) else set()
        if node in outputs or not mine:
            kernel[node] = node
        elif len(mine) > 1:
            adds_a_pass = kernel[node] < 0 or node in reduced or _reductions(graph, node) > 0
            # a float64 kernel computes its parts in float64, and a kernel is one if it loads float64: a part that is
            # kept in another dtype than it is computed in would not have the same values, nor would its users
            as_computed = (graph.node_dtype[node] == F64) == (node in wide)
            equal = as_computed and (node in wide or node not in below_wide)
            if adds_a_pass and equal and not _cheap(graph, node):
                kept.add(node)
                kernel[node] = node
        if kernel[node] == node:
            reduced.discard(node)
    return kept


def _users_of(graph: MergeGraph, nodes: Sequence[int], outputs: Set[int]) -> dict[int, list[int]]:
    """Return for each node the nodes that use it and that an output is computed from."""
    users = _needing(graph, nodes)
    live = {other for node in outputs for other in graph.results_with(node)}
    for node in reversed(nodes):
        if not live.isdisjoint(users.get(node, ())):
            live.add(node)
    return {node: [user for user in mine if user in live] for node, mine in users.items() if node in live}


def _needing(graph: MergeGraph, nodes: Sequence[int]) -> Mapping[int, list[int]]:
    """Return the users of nodes among these, without those that only compare their output with a node."""
    compared = {n: places for n, operation in enumerate(graph.operations) if (places := _only_compared(operation))}
    if not compared:
        return graph.users_among(nodes)
    found: dict[int, list[int]] = {}
    for node, users in graph.users_among(nodes).items():
        for user in users:
            ignored = compared.get(graph.node_operation[user])
            uses = (place for place, value in enumerate(graph.node_sources[user]) if value == ~node)
            if ignored is None or any(place not in ignored for place in uses):
                found.setdefault(node, []).append(user)
    return found


def _only_compared(operation: Operation) -> Set[int]:
    """Return the places of the sources that no output of an operation depends on."""
    kernel = operation.kernel
    return frozenset() if kernel is None else set(range(kernel.inputs.count)) - set(kernel.used)


def _reductions(graph: MergeGraph, node: int) -> int:
    kernel = graph.operation(node).kernel
    return 0 if kernel is None else kernel.reductions


def _cheap(graph: MergeGraph, node: int) -> bool:
    """Return whether computing a node again loads no more bytes than loading its output would."""
    sources = graph.node_sources[node]
    if _reductions(graph, node) or any(value < 0 for value in sources):
        return False
    return sum(map(graph.value_nbytes, dict.fromkeys(sources))) <= graph.nbytes(node)


def _wide(graph: MergeGraph, nodes: Sequence[int], outputs: Set[int]) -> set[int]:
    """Return the nodes that are computed in float64: they load it, directly or through nodes that are not outputs.

    Outputs are loaded in the dtype in which they are stored.
    """
    wide: set[int] = set()
    for node in nodes:
        for value in graph.node_sources[node]:
            loaded = value >= 0 or ~value in outputs
            if graph.value_dtype(value) == F64 if loaded else ~value in wide:
                wide.add(node)
                break
    return wide


# ------------------------------------------------------------------------------------------------ the fused graph


@dataclass(frozen=True, slots=True)
class _Parts:
    """The nodes that become one kernel.

    Args:
        nodes: the nodes, each after those that it uses; the last one is the node that they become.
        leaves: the values that the kernel loads, in the order of the sources, with their numbers.
    """

    nodes: list[int]
    leaves: dict[Leaf, int]


class _Order:
    """The numbers of nodes and reads in the fused graph.

    Args:
        graph: unfused graph.
        kept: nodes whose output is kept for others, besides the outputs.
        repeats: pieces that are fused like those that they repeat.

    Attributes:
        spans: nodes that are fused one by one, and pieces that repeat them, in the order of the fused graph.
        numbers: the new value of each value that kernels of these nodes load.
        made: for each output, its new node.
        used: for each read of the unfused graph, whether the fused one has it: 0 or 1.
    """

    def __init__(self, graph: MergeGraph, kept: Set[int], repeats: Sequence[Repeat]) -> None:
        self.spans: list[Sequence[int] | Repeat] = []
        self.numbers: dict[Value, Value] = {}
        self.made, self.used = array("I"), bytearray(len(graph.reads))
        self._graph = graph
        self._nodes: dict[int, range] = {}  # see `nodes`
        self._count = 0
        begin = 0
        for repeat in repeats:
            self._number(range(begin, repeat.outputs.start))
            self._repeat(repeat)
            begin = repeat.outputs.stop
        self._number(range(begin, len(graph.outputs)))
        self._add(sorted(node for node in kept if ~node not in self.numbers))
        self._ranks = array("I", accumulate(self.used, initial=0))
        loaded = {value for node in self.numbers for value in (graph.reads_of(~node) if node < 0 else ())}
        self.numbers |= {read: self._ranks[read] for read in loaded}

    def _number(self, outputs: range) -> None:
        """Number the nodes of outputs that are not repeated."""
        graph = self._graph
        nodes = dict.fromkeys(node for n in outputs for node in graph.results_with(graph.outputs.nodes[n]))
        self._add([node for node in nodes if ~node not in self.numbers])
        self.made.extend([~self.numbers[~graph.outputs.nodes[number]] for number in outputs])
        for node in nodes:
            if graph.operation(node).kind is not Kind.RESULT:
                for read in graph.reads_of(node):
                    self.used[read] = 1

    def _add(self, nodes: Sequence[int]) -> None:
        self.numbers |= {~node: ~number for number, node in enumerate(nodes, self._count)}
        self._count += len(nodes)
        self.spans.append(nodes)

    def _repeat(self, repeat: Repeat) -> None:
        """Number the nodes of pieces."""
        for piece in repeat.likes:
            own = self.nodes(piece)
            shift = self._count - own.start
            self.made.extend([node + shift for node in self.made[piece.outputs.start : piece.outputs.stop]])
            self._count += len(own)
        self.used[repeat.reads.start : repeat.reads.stop] = b"\1" * len(repeat.reads)
        self.spans.append(repeat)

    def nodes(self, piece: Piece) -> range:
        """The new nodes of a piece that others repeat."""
        found = self._nodes.get(piece.nodes.start)
        if found is None:
            outputs = self._graph.outputs.nodes[piece.outputs.start : piece.outputs.stop]
            results = {~self.numbers[~node] for output in outputs for node in self._graph.results_with(output)}
            found = self._nodes[piece.nodes.start] = range(min(results), max(results) + 1)
        return found

    def reads(self, piece: Piece | Repeat) -> range:
        """The new reads of a piece."""
        first = self._ranks[piece.reads.start]
        return range(first, first + len(piece.reads))


@dataclass(slots=True)
class _Fusion:
    """Builds the fused graph.

    Args:
        graph: unfused graph.
        kept: nodes whose output is kept for others, besides the outputs.
        repeats: pieces that are fused like those that they repeat.
        users: for each node that no piece has added, the nodes that use it.
    """

    graph: MergeGraph
    kept: Set[int]
    repeats: Sequence[Repeat]
    users: Mapping[int, list[int]]
    _operations: dict[Hashable, Operation] = field(default_factory=dict)
    _kernels: dict[Hashable, Composition] = field(default_factory=dict)  # of expressions that fit all shapes

    def fused(self) -> MergeGraph:
        """Return the fused graph. Its outputs have the same numbers."""
        graph, order = self.graph, _Order(self.graph, self.kept, self.repeats)
        result = MergeGraph(graph.models, graph.reads.chosen(order.used))
        result.outputs = graph.outputs.moved(order.made)
        pieces, fused = Pieces(result), dict[int, Piece]()
        for span in order.spans:
            if not isinstance(span, Repeat):
                self._append(result, span, order.numbers)
                continue
            for piece in span.likes:
                if piece.nodes.start not in fused:
                    found = pieces.of(order.reads(piece), order.nodes(piece), piece.outputs)
                    assert found is not None
                    fused[piece.nodes.start] = found
            pieces.repeat_nodes([fused[piece.nodes.start] for piece in span.likes], order.reads(span).start)
        return result

    def _append(self, result: MergeGraph, nodes: Sequence[int], numbers: Mapping[Value, Value]) -> None:
        """Append nodes to the fused graph. `numbers` has the values that are loaded, with those that they become."""
        graph = self.graph
        for node in nodes:
            if graph.operation(node).kind is Kind.RESULT:
                computing, place = numbers[graph.node_sources[node][0]], graph.node_key[node]
                operation, dtype, shape = graph.operation(node), graph.node_dtype[node], graph.shape(node)
                result.append_node(operation, (computing,), dtype, place, shape)
                continue
            operation, leaves, dtype, key = self._kernel_of(node, numbers)
            result.append_node(operation, tuple(numbers[value] for value, _ in leaves), dtype, key, graph.shape(node))
        for node in nodes:
            if len(others := graph.results(node)) > 1:
                result.set_results(~numbers[~node], [~numbers[~other] for other in others[1:]])

    def _kernel_of(self, node: int, boundary: Mapping[Value, Value]) -> tuple[Operation, tuple[Leaf, ...], DType, int]:
        """Return the operation that computes a node with all its parts, its sources, its dtype and its random key."""
        graph, dtype = self.graph, self.graph.node_dtype[node]
        while (inner := self._converted(node, boundary)) is not None and (
            not self._converts(inner) or graph.node_dtype[inner] == dtype
        ):
            node = inner  # the conversion is the rounding of the output
        if all(value >= 0 or value in boundary for value in graph.node_sources[node]):
            operation = graph.operation(node)
            sources = graph.node_sources[node]
            leaves = tuple((value, graph.access(node, place)) for place, value in enumerate(sources))
            return operation, leaves, dtype, graph.node_key[node]
        parts = self._parts(node, boundary)
        return self._composed(parts), tuple(parts.leaves), dtype, 0

    def _converts(self, node: int) -> bool:
        """Return whether a node only converts the dtype of its source."""
        operation = self.graph.operation(node)
        return operation.kernel is not None and operation.kernel.copies is not None and not operation.accesses

    def _converted(self, node: int, boundary: Mapping[Value, Value]) -> int | None:
        """Return the node that a node only converts, if both are in one kernel."""
        source = self.graph.node_sources[node][0]
        return ~source if source < 0 and source not in boundary and self._converts(node) else None

    def _parts(self, root: int, boundary: Mapping[Value, Value]) -> _Parts:
        """Return the nodes that become the kernel of a node. `boundary` has the values that are loaded."""
        found = _Parts([], {})
        seen = {root}
        stack = [(root, 0)]
        while stack:
            node, place = stack.pop()
            sources = self.graph.node_sources[node]
            if place == len(sources):
                found.nodes.append(node)
                continue
            stack.append((node, place + 1))
            value = sources[place]
            if value >= 0 or value in boundary:
                found.leaves.setdefault((value, self.graph.access(node, place)), len(found.leaves))
            elif ~value not in seen:
                seen.add(~value)
                stack.append((~value, 0))
        return found

    def _composed(self, found: _Parts) -> Operation:
        """Return the operation of several nodes, shared by all that differ only in what they load."""
        graph, root = self.graph, found.nodes[-1]
        parts: list[Part] = []
        numbers: dict[int, int] = {}
        methods: list[tuple[str, tuple[tuple[str, object], ...]]] = []
        for node in found.nodes:
            operation = graph.operation(node)
            assert operation.kernel is not None
            sources = tuple(
                ~numbers[~value] if ~value in numbers else found.leaves[value, graph.access(node, place)]
                for place, value in enumerate(graph.node_sources[node])
            )
            rounding = graph.node_dtype[node].torch_name if self._converts(node) and node != root else None
            if rounding is not None and sources[0] < 0 and self.users[~graph.node_sources[node][0]] == [node]:
                parts[~sources[0]] = replace(parts[~sources[0]], round_to=rounding)
                numbers[node] = ~sources[0]
                continue
            numbers[node] = len(parts)
            parts.append(Part(operation.kernel, sources, graph.node_key[node], operation.positions, rounding))
            methods.append((operation.method, operation.parameters))
        loaded = tuple((access, access is ALIGNED or graph.value_shape(value)) for value, access in found.leaves)
        key = (tuple(map(_identity, parts)), loaded)
        known = self._operations.get(key)
        if known is None:
            accesses = tuple(access for _, access in found.leaves)
            if all(access is ALIGNED for access in accesses):
                accesses = ()
            stored = tuple(graph.value_shape(value) for value, _ in found.leaves) if accesses else ()
            kernel = self._kernel(InputSpec(len(found.leaves), None, graph.shape(root), accesses, stored), parts)
            loads = ("passthrough", ())  # converts the dtype, or loads a slice: not worth a word
            shown = dict.fromkeys(each[0] for each in reversed(methods) if each != loads) or ["passthrough"]
            name = " of ".join(shown)
            described = tuple((f"{number}. {method}", values) for number, (method, values) in enumerate(methods))
            known = Operation(Kind.MERGE, name, described, kernel=kernel)
            self._operations[key] = known
        return known

    def _kernel(self, inputs: InputSpec, parts: Sequence[Part]) -> Composition:
        """Return the kernel of several parts: a known one, if only the shape is another."""
        if inputs.accesses or not all(part.kernel.any_shape for part in parts):
            return Composition(inputs, parts)
        nodes = ((*part.kernel.outputs, *part.kernel.byproducts) for part in parts)
        key = (
            inputs.count,
            tuple((tuple(map(id, each)), *_identity(p)[1:]) for each, p in zip(nodes, parts, strict=True)),
        )
        known = self._kernels.get(key)
        if known is None:
            known = self._kernels[key] = Composition(inputs, parts)
            return known
        return known.with_parts(parts, inputs.shape)


def _identity(part: Part) -> tuple[Hashable, ...]:
    return id(part.kernel), part.sources, part.key, part.positions, part.round_to
