"""Orders of the nodes that are worth simulating."""

from __future__ import annotations

from collections.abc import Sequence

from ..graph.graph import MergeGraph
from .tiling import clusters


def orders(graph: MergeGraph) -> list[list[int]]:
    """Return orders worth simulating: by position of the sources in files, with consumers grouped, and as built."""
    files = {file: number for number, file in enumerate(sorted({ref.file for ref in graph.reads}))}
    tasks = graph.tasks()
    users = graph.users()

    def position(node: int) -> tuple[int, int]:
        value = graph.node_sources[node][0]
        ref = graph.reads[value if value >= 0 else graph.reads_of(node)[0]]
        return files[ref.file], ref.offset

    def with_sources(order: list[int]) -> list[int]:
        """Put each node right before the first one that uses it."""
        return _sources_first(graph, [node for node in order if node not in users]) if users else order

    by_position = sorted(tasks, key=position)
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
    found: list[list[int]] = []
    for order in map(with_sources, (by_position, together, tasks)):
        if order not in found:
            found.append(order)
    return found


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
