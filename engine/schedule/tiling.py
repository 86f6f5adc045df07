"""Divides tensors into chunks, the unit of I/O that fills a slot, and tiles, the unit of computation."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..graph.graph import Kind, MergeGraph


class ChunkedRead(NamedTuple):
    """A read in chunks of one length: the key of the cache, in the planner and in the executor.

    Nodes that share a read but not a chunk length cannot use each other's chunks.

    Args:
        read: number of the read.
        chunk_length: elements in a chunk (bytes, if nothing is computed).
    """

    read: int
    chunk_length: int


def length(graph: MergeGraph, node: int) -> int:
    """Return the length of a node's tensors: elements, or bytes if nothing is computed."""
    read = graph.reads[graph.node_sources[node][0]]
    return read.elements if graph.operation(node).kind is Kind.MERGE else read.nbytes


def chunk_count(graph: MergeGraph, node: int, chunk: int) -> int:
    """Return the number of chunks of `chunk` elements in a node's tensors."""
    return -(-length(graph, node) // chunk)


def widest(graph: MergeGraph, node: int) -> int:
    """Return the bytes per element of a node's widest tensor, its output included; 1 if nothing is computed."""
    if graph.operation(node).kind is not Kind.MERGE:
        return 1
    widths = [graph.reads[read].dtype.bits for read in graph.node_sources[node]]
    return max(*widths, graph.node_dtype[node].bits) // 8


def output_width(graph: MergeGraph, node: int) -> int:
    """Return the bytes per element of a node's output; 1 if nothing is computed."""
    return graph.node_dtype[node].bits // 8 if graph.operation(node).kind is Kind.MERGE else 1


def source_width(graph: MergeGraph, node: int, read: int) -> int:
    """Return the bytes per element of one of a node's sources; 1 if nothing is computed."""
    return graph.reads[read].dtype.bits // 8 if graph.operation(node).kind is Kind.MERGE else 1


def work_bytes(graph: MergeGraph, node: int) -> int:
    """Return the bytes per element of a node's arithmetic: 8 if an input is float64, else 4."""
    return 8 if any(graph.reads[read].dtype.name == "F64" for read in graph.node_sources[node]) else 4


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


def chunk_elements(graph: MergeGraph, slot: int) -> list[int]:
    """Return the elements in a chunk of each node; nodes that share a source get the same number if they can."""
    alignments = [
        1 if (kernel := graph.operation(node).kernel) is None else min(kernel.alignment, max(1, length(graph, node)))
        for node in graph
    ]
    widths = [widest(graph, node) for node in graph]
    chunks = [
        max(1, slot // (width * alignment)) * alignment for width, alignment in zip(widths, alignments, strict=True)
    ]
    for cluster in clusters(graph):
        alignment = math.lcm(*(alignments[node] for node in cluster))
        width = max(widths[node] for node in cluster)
        common = slot // (width * alignment) * alignment
        kinds = {graph.operation(node).kind is Kind.MERGE for node in cluster}
        if common and len(kinds) == 1:
            for node in cluster:
                chunks[node] = common
    return chunks


def clusters(graph: MergeGraph) -> list[list[int]]:
    """Return the groups of two or more nodes that are connected by common sources."""
    consumers = graph.consumers()
    if all(len(nodes) < 2 for nodes in consumers):
        return []
    seen: set[int] = set()
    groups = []
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
            groups.append(sorted(cluster))
    return groups
