"""Extents: which bytes of its sources a node needs for a range of its output, and which bytes of its tensors it makes.

This is the only place that turns elements into byte ranges. The planner, the executor, the recovery and the reports
call it.
"""

from __future__ import annotations

import functools
from array import array
from typing import NamedTuple

from ...methods.kernel.access import ALIGNED, Access, BlockRows, Shape
from .graph import Kind, MergeGraph


class ByteRange(NamedTuple):
    """A range of bytes of a stored tensor.

    Args:
        offset: offset of the first byte in the tensor; -1 for zeros that no file holds.
        nbytes: number of bytes.
    """

    offset: int
    nbytes: int


def by_element(graph: MergeGraph, node: int) -> bool:
    """Return whether ranges of a node are counted in elements; otherwise its bytes are copied, and counted."""
    operation = graph.operation(node)
    return operation.kind in (Kind.MERGE, Kind.RESULT) or bool(operation.accesses)


def length(graph: MergeGraph, node: int) -> int:
    """Return the length of a node's output: elements, or bytes if nothing is computed."""
    return graph.elements(node) if by_element(graph, node) else graph.nbytes(node)


def output_width(graph: MergeGraph, node: int) -> int:
    """Return the bytes per element of a node's output; 1 if its bytes are counted."""
    return graph.node_dtype[node].bits // 8 if by_element(graph, node) else 1


def made(graph: MergeGraph, node: int, first: int, count: int) -> ByteRange:
    """Return the bytes of a tensor that are computed with a range of the elements of the node that computes it.

    Args:
        graph: the graph.
        node: number of the node, which may be of kind `RESULT`.
        first: first element of the range (byte, if nothing is computed), where a chunk starts.
        count: number of elements (bytes).
    """
    width, access = output_width(graph, node), graph.operation(node).made
    if access is ALIGNED or not count:
        return ByteRange(first * width if count else 0, count * width)
    computing = ~graph.node_sources[node][0]
    (span,) = access.spans(graph.shape(computing), graph.shape(node), first, count)
    return ByteRange(span.start * width, span.length * width)


def bytes_before(graph: MergeGraph, node: int, first: int) -> int:
    """Return the bytes of a tensor that are made with the elements before one where a chunk starts."""
    computing = graph.results_with(node)[0]
    return made(graph, node, 0, min(first, length(graph, computing))).nbytes


def most_made(graph: MergeGraph, node: int, count: int) -> int:
    """Return the bytes that any `count` elements of a node make of its tensors with one element per block, at most.

    Those of other tensors are `output_width` for each element.
    """
    shape = graph.shape(node)
    return max(
        (
            graph.operation(result).made.most(shape, graph.shape(result), count) * output_width(graph, result)
            for result in graph.results(node)
            if graph.operation(result).made is not ALIGNED
        ),
        default=0,
    )


def source_width(graph: MergeGraph, node: int, place: int) -> int:
    """Return the bytes per element of one of a node's sources; 1 if bytes are counted."""
    return graph.value_dtype(graph.node_sources[node][place]).bits // 8 if by_element(graph, node) else 1


def extent(graph: MergeGraph, node: int, place: int, first: int, count: int) -> list[ByteRange]:
    """Return the bytes of a source that a range of a node's output needs, in the order in which they are staged.

    Args:
        graph: the graph.
        node: number of the node.
        place: place of the source among the node's sources.
        first: first element of the range (byte, if nothing is computed).
        count: number of elements (bytes), at least 1.
    """
    access, width = graph.access(node, place), source_width(graph, node, place)
    if access is ALIGNED:
        return [ByteRange(first * width, count * width)]
    part = graph.value_shape(graph.node_sources[node][place])
    return [
        ByteRange(-1 if span.start < 0 else span.start * width, span.length * width)
        for span in access.spans(graph.shape(node), part, first, count)
    ]


def staged_whole(graph: MergeGraph, node: int, place: int, slot: int) -> bool:
    """Return whether all of a source is staged at once, in a slot of `slot` bytes, and used for every chunk.

    The scales of a quantized tensor are a few bytes for each chunk, so all of them are read once where they fit.
    """
    access, source = graph.access(node, place), graph.node_sources[node][place]
    if not isinstance(access, BlockRows):
        return access.whole(graph.shape(node), graph.value_shape(source))
    return graph.value_nbytes(source) <= slot


def staged_bytes(graph: MergeGraph, node: int, place: int, count: int) -> int:
    """Return the bytes that are staged of a source for any `count` elements of a node's output, at most."""
    width, access = source_width(graph, node, place), graph.access(node, place)
    if access is ALIGNED:
        return count * width
    value = graph.node_sources[node][place]
    return access.most(graph.shape(node), graph.value_shape(value), count) * width


def bytes_of_chunks(
    graph: MergeGraph, node: int, place: int, chunk: int, begin: int, end: int, *, zeros: bool = False
) -> int:
    """Return the bytes in files that the chunks [begin, end) of a node's output need of a source.

    Args:
        graph: the graph.
        node: number of the node.
        place: place of the source among the node's sources.
        chunk: elements (bytes) in a chunk; the last chunk may be shorter.
        begin: number of the first chunk.
        end: number of the chunk after the last one.
        zeros: whether to count all bytes that are staged, those of zeros that no file holds included.
    """
    if begin >= end:
        return 0
    width, access = source_width(graph, node, place), graph.access(node, place)
    size = length(graph, node)
    if access is ALIGNED or (zeros and access.aligned):
        return (min(end * chunk, size) - min(begin * chunk, size)) * width
    sums = _sums(access, graph.shape(node), graph.value_shape(graph.node_sources[node][place]), size, chunk)
    return (sums[min(end, len(sums) - 1)] - sums[min(begin, len(sums) - 1)]) * width


@functools.lru_cache(maxsize=256)
def _sums(access: Access, shape: Shape, part: Shape, size: int, chunk: int) -> array[int]:
    """For each number of chunks, the elements in files that the first chunks need. Equal for a class of tensors."""
    sums = array("q", [0])
    for first in range(0, size, chunk):
        spans = access.spans(shape, part, first, min(chunk, size - first))
        sums.append(sums[-1] + sum(span.length for span in spans if span.start >= 0))
    return sums
