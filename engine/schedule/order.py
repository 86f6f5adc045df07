"""Orders of the nodes that are worth simulating."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from ..graph.graph import MergeGraph
from .tiling import clusters


def orders(graph: MergeGraph) -> Iterator[Sequence[int]]:
    """Yield orders worth simulating: by position of the sources in files, with consumers grouped, and as built."""
    tasks, users = graph.tasks(), graph.users()
    by_position = array("I", sorted(tasks, key=_positions(graph).__getitem__))
    shares = bool(clusters(graph))
    tried: list[array[int]] = []
    for number in range(3 if shares else 1):
        order: Sequence[int] = by_position
        if number:  # the positions of all nodes take memory, so they are found again
            order = tasks if number == 2 else _together(graph, by_position, _positions(graph))
        if users:  # each node comes right before the first one that uses it
            order = _sources_first(graph, [node for node in order if node not in users])
        found = array("I", order)
        if found not in tried:
            tried.append(found)
            yield found


def _positions(graph: MergeGraph) -> list[int]:
    """Return for each node the place on the disk of the first read that it is computed from: its file and offset."""
    names, (files, offsets) = graph.reads.files, graph.reads.places()
    ranks = {number: rank for rank, number in enumerate(sorted(range(len(names)), key=names.__getitem__))}
    positions = []
    for value in graph.node_sources.firsts(graph.nodes()):
        while value < 0:
            value = graph.node_sources[~value][0]
        positions.append(ranks[files[value]] << 64 | offsets[value])
    return positions


def _together(graph: MergeGraph, order: Sequence[int], positions: Sequence[int]) -> list[int]:
    """Return the nodes with those that share reads one after another."""
    consumers = graph.consumers()
    together: list[int] = []
    seen: set[int] = set()
    for start in order:
        stack = [start]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            together.append(node)
            reads = [value for value in graph.node_sources[node] if value >= 0]
            neighbours = {other for read in reads for other in consumers[read]} - seen
            stack.extend(sorted(neighbours, key=positions.__getitem__, reverse=True))
    return together


def _sources_first(graph: MergeGraph, order: Sequence[int]) -> list[int]:
    """Return the nodes of an order and all nodes that they use, each after its sources and as late as possible."""
    done: set[int] = set()
    result = []
    for root in order:
        stack = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if node in done:
                continue
            if ready:
                done.add(node)
                result.append(node)
                continue
            stack.append((node, True))
            stack += [(~value, False) for value in reversed(graph.node_sources[node]) if value < 0]
    return result
