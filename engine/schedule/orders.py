"""Finds the orders of a graph's nodes that are worth simulating."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ..graph.graph import MergeGraph
from .tiling import clusters


def orders(graph: MergeGraph) -> list[Sequence[int]]:
    """Return orders worth simulating: by position of the sources in files, with consumers grouped, and as built."""
    names = graph.reads.files
    ranks = {number: rank for rank, number in enumerate(sorted(range(len(names)), key=names.__getitem__))}
    files, offsets = graph.reads.places()
    tasks = graph.tasks()
    users = graph.users()

    def position(node: int) -> int:
        value = graph.node_sources[node][0]
        read = value if value >= 0 else graph.reads_of(node)[0]
        return ranks[files[read]] << 64 | offsets[read]

    def with_sources(order: Sequence[int]) -> Sequence[int]:
        """Put each node right before the first one that uses it."""
        return _sources_first(graph, [node for node in order if node not in users]) if users else order

    by_position = array("I", sorted(tasks, key=position))
    if not clusters(graph):
        return [by_position]
    consumers = graph.consumers()
    together: list[int] = []
    seen: set[int] = set()
    for start in by_position:
        stack = [start]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            together.append(node)
            reads = [value for value in graph.node_sources[node] if value >= 0]
            neighbours = {other for read in reads for other in consumers[read]} - seen
            stack.extend(sorted(neighbours, key=position, reverse=True))
    return [with_sources(order) for order in (by_position, together, tasks)]


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
