"""Pieces of a graph: what one tensor adds to it, if that uses nothing else.

Tensors of one class add pieces that differ only in names and places. One of them is made node by node, and the others
repeat it: nearly all tensors of a mixture of experts are added, and fused, in this way.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby, repeat
from operator import attrgetter

from .columns.reads import StoredTensors
from .columns.repeats import Piece, Repeat, Structure
from .columns.rows import woven
from .graph import MergeGraph


class Pieces:
    """Finds pieces of a graph, and adds others that repeat them.

    Args:
        graph: the graph.
    """

    def __init__(self, graph: MergeGraph) -> None:
        self._graph = graph
        self._structures: dict[Structure, Structure] = {}

    def since(self, before: tuple[int, int, int]) -> Piece | None:
        """Return what was added since `MergeGraph.counts` returned `before`; None if that is not a piece."""
        return self.of(*map(range, before, self._graph.counts()))

    def of(self, reads: range, nodes: range, outputs: range) -> Piece | None:
        """Return the piece with these reads, nodes and outputs; None if they use, or are of, any others."""
        graph, made = self._graph, self._graph.outputs.nodes[outputs.start : outputs.stop]
        sources = list(chain.from_iterable(graph.node_sources[nodes.start : nodes.stop]))
        alone = all(value in reads if value >= 0 else ~value in nodes for value in sources)
        if not (reads and outputs and alone and all(node in nodes for node in made)):
            return None
        first = nodes.start
        users = graph.reads.first_users[reads.start : reads.stop], graph.first_users[nodes.start : nodes.stop]
        read_users, node_users = (tuple([each - first if each in nodes else -1 for each in own]) for own in users)
        results = [(node, graph.results(node)[1:]) for node in nodes]
        structure = Structure(
            len(reads),
            tuple(map(graph.node_sources.length, nodes)),
            tuple([value - reads.start if value >= 0 else value + first for value in sources]),
            read_users,
            node_users,
            tuple([(node - first, tuple([each - first for each in own])) for node, own in results if own]),
            tuple([node - first for node in made]),
        )
        return Piece(reads.start, first, outputs.start, self._structures.setdefault(structure, structure))

    def repeat(
        self,
        likes: Sequence[Piece],
        tensors: Sequence[StoredTensors],
        order: Sequence[int],
        names: Sequence[str],
        keys: Mapping[int, int],
        group: int,
    ) -> None:
        """Add pieces that differ from others in the names and places of their tensors.

        Args:
            likes: the others.
            tensors: for each model, the stored tensors, of which no reads were added before.
            order: for each read of the new pieces, the place of its tensor among all `tensors`.
            names: names of the outputs.
            keys: random keys, by the number of the node counted from the first new one.
            group: group of the outputs.
        """
        graph, before = self._graph, self._graph.counts()
        like, users, made = list[int](), array("i"), list[int]()
        for structure, pieces, _, nodes in _runs(likes, *before[:2]):
            places = range(structure.reads)
            like += [piece.first_read + place for piece in pieces for place in places]
            users.extend(_numbers(nodes, structure.read_users))
            made += _numbers(nodes, structure.outputs)
        graph.reads.repeat(like, tensors, order, users)
        self.repeat_nodes(likes, before[0])
        for number, key in keys.items():
            graph.node_key[before[1] + number] = key
        graph.outputs.extend(names, made, group)
        if graph.uses_nodes:  # otherwise there is nothing to fuse
            graph.repeats.append(Repeat(likes, *map(range, before, graph.counts())))

    def repeat_nodes(self, likes: Sequence[Piece], read: int) -> None:
        """Add nodes that repeat those of pieces, on other reads, which begin with `read`."""
        graph, first_node = self._graph, len(self._graph.node_operation)
        runs = list(_runs(likes, read, first_node))
        like = array("I")
        for structure, pieces, _, _ in runs:
            places = range(len(structure.lengths))
            like.extend(array("I", [piece.first_node + place for piece in pieces for place in places]))
        graph.repeat_nodes(like)
        for structure, _, reads, nodes in runs:
            sources = woven(
                range(value + reads.start, value + reads.stop, reads.step)
                if value >= 0
                else range(value - nodes.start, value - nodes.stop, -nodes.step)
                for value in structure.sources
            )
            graph.node_sources.extend(sources, structure.lengths * len(nodes))
            graph.first_users.extend(_numbers(nodes, structure.node_users))
            graph.reads.used[reads.start : reads.stop] = b"\1" * (reads.stop - reads.start)
            for own in nodes if structure.results else ():
                for computing, others in structure.results:
                    graph.set_results(own + computing, [own + other for other in others])


def _numbers(firsts: range, within: Iterable[int]) -> array[int]:
    """Number what some pieces have, by the first number of each piece and the numbers within one; -1 stays as it is."""
    found = [range(firsts.start + own, firsts.stop + own, firsts.step) if own >= 0 else None for own in within]
    return woven(repeat(-1, len(firsts)) if each is None else each for each in found)


def _runs(likes: Sequence[Piece], read: int, node: int) -> Iterator[tuple[Structure, list[Piece], range, range]]:
    """Yield the runs of pieces with the same structure: the first read and the first node of each piece like these."""
    for structure, found in groupby(likes, attrgetter("structure")):
        pieces = list(found)
        count, size = len(pieces), len(structure.lengths)
        reads = range(read, read + count * structure.reads, structure.reads)
        nodes = range(node, node + count * size, size)
        yield structure, pieces, reads, nodes
        read, node = reads.stop, nodes.stop


def independent(graph: MergeGraph) -> Sequence[Repeat]:
    """Return the pieces that repeat others, if each can be fused like the one that it repeats; else none.

    That is so if nothing outside a piece uses its nodes, its outputs are computed from all of its reads, and it needs
    no random key, which is a part of a kernel.
    """
    likes = {piece.nodes.start: piece for repeat in graph.repeats for piece in repeat.likes}
    piece_of = {node: piece for piece in likes.values() for node in piece.nodes}
    rest = not_repeated(len(graph.node_operation), [each.nodes for each in graph.repeats])
    repeated = bytearray(b"\1") * len(graph.node_operation)
    for node in rest:
        repeated[node] = 0
    for node in rest:
        for used in [~value for value in graph.node_sources[node] if value < 0]:
            if repeated[used] or piece_of.get(used) is not piece_of.get(node):
                return ()
    for number in not_repeated(len(graph.outputs), [each.outputs for each in graph.repeats]):
        node = graph.outputs.nodes[number]
        if repeated[node] or (node in piece_of and number not in piece_of[node].outputs):
            return ()
    for piece in likes.values():
        made = {node for number in piece.outputs for node in graph.results_with(graph.outputs.nodes[number])[:1]}
        if {read for node in made for read in graph.reads_of(node)} != set(piece.reads):
            return ()
    kernels = (graph.operation(node).kernel for node in piece_of)
    return () if any(kernel is not None and kernel.random for kernel in kernels) else graph.repeats


def not_repeated(count: int, ranges: Iterable[range]) -> list[int]:
    """Return the numbers below `count` that are in none of some ranges, which are in order."""
    begins, ends = [0], list[int]()
    for each in ranges:
        ends.append(each.start)
        begins.append(each.stop)
    return list(chain.from_iterable(map(range, begins, [*ends, count])))
