"""How a node's tensors are cut: chunks that fill a slot, and tiles that a compute thread works on."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..graph.graph import Kind, MergeGraph


class ChunkedRead(NamedTuple):
    """A read in chunks of one length: what the planner caches and drops, and where the executor finds its chunks.

    Nodes that share a read but not a chunk length can't use each other's chunks.

    Args:
        read: number of the read.
        chunk_length: elements of a chunk (bytes, where nothing is computed).
    """

    read: int
    chunk_length: int


def length(graph: MergeGraph, node: int) -> int:
    """What a node's chunks divide: elements, or bytes where nothing is computed."""
    read = graph.reads[graph.node_sources[node][0]]
    return read.elements if graph.operation(node).kind is Kind.MERGE else read.nbytes


def chunk_count(graph: MergeGraph, node: int, chunk: int) -> int:
    """How many chunks of `chunk` elements a node's tensors have."""
    return -(-length(graph, node) // chunk)


def widest(graph: MergeGraph, node: int) -> int:
    """The bytes of an element in the widest of a node's tensors, its output included; 1 where chunks count bytes."""
    if graph.operation(node).kind is not Kind.MERGE:
        return 1
    widths = [graph.reads[read].dtype.bits for read in graph.node_sources[node]]
    return max(*widths, graph.node_dtype[node].bits) // 8


def output_width(graph: MergeGraph, node: int) -> int:
    """The bytes of an element of a node's output; 1 where chunks count bytes."""
    return graph.node_dtype[node].bits // 8 if graph.operation(node).kind is Kind.MERGE else 1


def source_width(graph: MergeGraph, node: int, read: int) -> int:
    """The bytes of an element of one of a node's sources; 1 where chunks count bytes."""
    return graph.reads[read].dtype.bits // 8 if graph.operation(node).kind is Kind.MERGE else 1


def work_bytes(graph: MergeGraph, node: int) -> int:
    """The bytes of an element of a node's arithmetic: 8 where an input is float64, else 4."""
    return 8 if any(graph.reads[read].dtype.name == "F64" for read in graph.node_sources[node]) else 4


def tile_length(graph: MergeGraph, node: int, aim: int) -> int:
    """The elements of a node's compute tiles: as near to `aim` as its granule allows, at least one granule."""
    kernel = graph.operation(node).kernel
    if kernel is None:
        return aim
    return max(1, aim // kernel.alignment) * kernel.alignment


def chunk_elements(graph: MergeGraph, slot: int) -> list[int]:
    """For each node the elements in a chunk; nodes that share a source share it too where they can."""
    granules = [
        1 if (kernel := graph.operation(node).kernel) is None else min(kernel.alignment, max(1, length(graph, node)))
        for node in graph
    ]
    widths = [widest(graph, node) for node in graph]
    chunks = [
        max(1, slot // (width * alignment)) * alignment for width, alignment in zip(widths, granules, strict=True)
    ]
    for cluster in clusters(graph):
        alignment = math.lcm(*(granules[node] for node in cluster))
        width = max(widths[node] for node in cluster)
        common = slot // (width * alignment) * alignment
        kinds = {graph.operation(node).kind is Kind.MERGE for node in cluster}
        if common and len(kinds) == 1:
            for node in cluster:
                chunks[node] = common
    return chunks


def clusters(graph: MergeGraph) -> list[list[int]]:
    """Groups of two and more nodes that hang together by common sources."""
    consumers = graph.consumers()
    if all(len(nodes) < 2 for nodes in consumers):
        return []
    seen: set[int] = set()
    found = []
    for start in graph:
        if start in seen:
            continue
        seen.add(start)
        cluster, open_nodes = [], [start]
        while open_nodes:
            node = open_nodes.pop()
            cluster.append(node)
            for read in graph.node_sources[node]:
                for other in consumers[read]:
                    if other not in seen:
                        seen.add(other)
                        open_nodes.append(other)
        if len(cluster) > 1:
            found.append(sorted(cluster))
    return found
