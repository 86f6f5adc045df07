"""Divides tensors into chunks, the unit of I/O that fills a slot, and tiles, the unit of computation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from ...methods.kernel.access import ALIGNED, TransposedSlice, matrices
from ..graph.extents import by_element, length, most_made, staged_bytes, staged_whole
from ..graph.graph import Kind, MergeGraph, Value


class ChunkedRead(NamedTuple):
    """A value in chunks of one length: the key of the cache, in the planner and in the executor.

    Nodes that share a source but not a chunk length, or not the access, cannot use each other's chunks.

    Args:
        read: number of the read, or ``~node``.
        chunk_length: elements in a chunk (bytes, if nothing is computed); 0 if it is staged at once.
        access: number of the access in the graph; 0 for all bytes of a value in their order.
    """

    read: Value
    chunk_length: int
    access: int = 0


def chunked_sources(graph: MergeGraph, node: int, chunk: int, slot: int) -> tuple[ChunkedRead, ...]:
    """Return the distinct sources of a node, cut into chunks of its output.

    Args:
        graph: graph that has the node.
        node: number of the node.
        chunk: elements in a chunk of the node's output (bytes, if nothing is computed).
        slot: size of a slot in bytes.
    """
    sources, accesses = graph.node_sources[node], graph.access_numbers(node)
    if not accesses:
        return tuple([ChunkedRead(value, chunk) for value in dict.fromkeys(sources)])
    found: dict[ChunkedRead, None] = {}
    for place in graph.places(node):
        whole = staged_whole(graph, node, place, slot)
        own = ChunkedRead(sources[place], 0 if whole else chunk, accesses[place])
        complete = whole and staged_bytes(graph, node, place, length(graph, node)) == graph.value_nbytes(own.read)
        shared = own._replace(access=0) if complete else own
        found[own if shared in found else shared] = None
    return tuple(found)


def chunk_count(graph: MergeGraph, node: int, chunk: int) -> int:
    """Return the number of chunks of `chunk` elements in a node's output."""
    return -(-length(graph, node) // chunk)


def widest(graph: MergeGraph, node: int) -> int:
    """Return the bytes per element of the widest of a node's aligned tensors; 1 if bytes are counted.

    Sources with another access are staged in `staged_bytes`, and tensors with one element per block in `most_made`.
    """
    if not by_element(graph, node):
        return 1
    results = graph.results(node)
    widths = [graph.node_dtype[result].bits for result in results if graph.operation(result).made is ALIGNED]
    sources: Sequence[Value] = graph.node_sources[node]
    if accesses := graph.operation(node).accesses:
        sources = [value for value, access in zip(sources, accesses, strict=True) if access.aligned]
    return max([*widths, *(graph.value_dtype(value).bits for value in sources)]) // 8


def work_bytes(graph: MergeGraph, node: int) -> int:
    """Return the bytes per element of a node's arithmetic: 8 if an input is float64, else 4."""
    return 8 if any(graph.value_dtype(value).name == "F64" for value in graph.node_sources[node]) else 4


def tile_length(graph: MergeGraph, node: int, preferred: int) -> int:
    """Return the number of elements in a node's compute tiles.

    Args:
        graph: graph that has the node.
        node: number of the node.
        preferred: preferred number, which is rounded down to a multiple of the kernel's alignment, but not to 0.
    """
    kernel = graph.operation(node).kernel
    if kernel is None:
        return preferred
    return max(1, preferred // kernel.alignment) * kernel.alignment


def alignment_of(graph: MergeGraph, node: int) -> int:
    """Return the number that the elements of a node's chunks are a multiple of, at most its length."""
    kernel = graph.operation(node).kernel
    return 1 if kernel is None else min(kernel.alignment, max(1, length(graph, node)))


def common_alignment(graph: MergeGraph, nodes: Sequence[int]) -> int:
    """Return the number that the elements of common chunks of some nodes are a multiple of, at most their length."""
    alignment = math.lcm(*(alignment_of(graph, node) for node in nodes))
    return min(alignment, max(1, *(length(graph, node) for node in nodes)))


def chunk_elements(graph: MergeGraph, slot: int) -> list[int]:
    """Return the elements in a chunk of each node; nodes that share a source get the same number if they can.

    A node and those that use it always get the same number: `slot` is large enough for it (see `requirements`).
    """
    chunks = graph.by_class(lambda node: _longest(graph, [node], slot) or alignment_of(graph, node))
    together = {node: group for group in connected(graph) for node in group}
    for cluster in clusters(graph):
        common = _longest(graph, cluster, slot)
        if common and len({by_element(graph, node) for node in cluster}) == 1:
            for node in cluster:
                chunks[node] = common
            continue
        for node in cluster:
            if node in together:
                chunks[node] = _longest(graph, together[node], slot)
    several = any(operation.kind is Kind.RESULT for operation in graph.operations)
    for node in graph if several else ():
        for other in graph.results(node)[1:]:
            chunks[other] = chunks[node]
    return chunks


def _longest(graph: MergeGraph, nodes: Sequence[int], slot: int) -> int:
    """Return the elements of the longest chunk that all of some nodes can have; 0 if a slot is too small.

    Of a source that is staged by rows, a row is read twice if a chunk ends within it: chunks have complete rows if
    they can.
    """
    blocked = [node for node in nodes if most_made(graph, node, 1)]
    alignment = common_alignment(graph, nodes)
    longest = slot // (max(widest(graph, node) for node in nodes) * alignment)
    staged = [node for node in nodes if graph.access_numbers(node)]
    if not staged and not blocked:
        return longest * alignment

    def fits(elements: int) -> bool:
        if any(most_made(graph, node, elements) > slot for node in blocked):
            return False
        return all(staged_bytes(graph, node, p, elements) <= slot for node in staged for p in graph.places(node))

    columns = math.lcm(*(max(1, (graph.shape(node) or (1,))[-1]) for node in staged))
    for unit in (math.lcm(alignment, columns), alignment):
        low, high = 0, longest * alignment // unit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle * unit) else (low, middle - 1)
        if low:
            return _even(graph, staged, low, unit)
    return 0


def _even(graph: MergeGraph, nodes: Sequence[int], most: int, unit: int) -> int:
    """Return the elements of a chunk of at most `most` units that divides transposed matrices evenly, if it can.

    Of a transposed matrix, a chunk reads a range of each stored row. With chunks of equal lengths, these ranges are
    digested as one; a matrix that is shorter than a chunk is read at once.
    """
    turned = [node for node in nodes for each in graph.operation(node).accesses if isinstance(each, TransposedSlice)]
    sizes = {rows * columns for _, rows, columns in (matrices(graph.shape(node)) for node in turned)}
    if len(sizes) != 1:
        return most * unit
    (size,) = sizes
    if size % unit == 0 and size <= most * unit:
        return most * unit // size * size
    return next((count * unit for count in range(most, most // 2, -1) if size % (count * unit) == 0), most * unit)


def connected(graph: MergeGraph) -> list[list[int]]:
    """Return the groups of two or more nodes that are connected as source and consumer."""
    users, seen = graph.users(), set[int]()
    groups = []
    for start in users:
        if start in seen:
            continue
        seen.add(start)
        group, open_nodes = [], [start]
        while open_nodes:
            node = open_nodes.pop()
            group.append(node)
            sources = [~value for value in graph.node_sources[node] if value < 0]
            for other in (*users.get(node, ()), *sources):
                if other not in seen:
                    seen.add(other)
                    open_nodes.append(other)
        groups.append(sorted(group))
    return groups


def clusters(graph: MergeGraph) -> list[list[int]]:
    """Return the groups of two or more nodes that are connected by common sources, or as source and consumer."""
    users = graph.users()
    if not users and not graph.shares_reads:
        return []
    consumers = graph.consumers()
    seen: set[int] = set()
    groups = []
    for start in graph.tasks():
        if start in seen:
            continue
        seen.add(start)
        cluster, open_nodes = [], [start]
        while open_nodes:
            node = open_nodes.pop()
            cluster.append(node)
            neighbours: list[Sequence[int]] = [users.get(node, [])]
            neighbours += [consumers[value] if value >= 0 else [~value] for value in graph.node_sources[node]]
            for other in chain.from_iterable(neighbours):
                if other not in seen:
                    seen.add(other)
                    open_nodes.append(other)
        if len(cluster) > 1:
            groups.append(sorted(cluster))
    return groups
