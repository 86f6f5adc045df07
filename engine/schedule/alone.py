"""The steps that share nothing with other steps, which are nearly all steps of most merges.

What such a step takes depends only on the class of its node, so it is found once for each class.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

from ..graph.extents import bytes_of_chunks, length
from ..graph.graph import Kind, MergeGraph
from .tiling import chunk_count, chunked_sources


class StepAlone(NamedTuple):
    """The only step of a node that shares no source, and whose output no other node uses.

    Args:
        bytes_read: for each source, the bytes read from files.
        nbytes: all of these bytes.
        staged: bytes that are put into slots: those that are read, and zeros that no file holds.
        slots: number of slots that one chunk takes.
        demand: number of slots that all chunks take.
        computes: whether the node computes anything, on a device's own memory if the device has it.
    """

    bytes_read: tuple[int, ...]
    nbytes: int
    staged: int
    slots: int
    demand: int
    computes: bool


class StepsAlone:
    """Finds the steps that share nothing.

    Args:
        graph: graph to schedule.
        chunk_elements: for each node, the elements in a chunk.
        slot: size of a slot in bytes.
    """

    def __init__(self, graph: MergeGraph, chunk_elements: list[int], slot: int) -> None:
        self._graph = graph
        self._classes = graph.node_class
        self._chunk_elements = chunk_elements
        self._slot = slot
        self._found: dict[tuple[int, int], StepAlone] = {}

    def nodes(self, shared: bytearray, started: Container[int]) -> bytearray:
        """Return for each node whether its only step shares nothing with other steps: 0 or 1.

        Args:
            shared: for each read, whether several nodes use it.
            started: nodes whose step begins with another chunk than the first.
        """
        graph = self._graph
        alone = bytearray(graph.by_class(lambda node: graph.operation(node).passes == 1))
        for node, users in graph.users().items():
            for other in (node, *users):
                alone[other] = 0
        for node in graph if started else ():
            alone[node] &= node not in started
        if any(shared):
            for node, sources in enumerate(graph.node_sources):
                if any(value >= 0 and shared[value] for value in sources):
                    alone[node] = 0
        return alone

    def steps(self, nodes: Sequence[int]) -> list[StepAlone]:
        """Return what such a step of each of some nodes takes."""
        chunks = map(self._chunk_elements.__getitem__, nodes)
        keys = list(zip(map(self._classes.__getitem__, nodes), chunks, strict=True))
        for key, node in dict(zip(keys, nodes, strict=True)).items():
            if key not in self._found:
                self._found[key] = self._find(node)
        return list(map(self._found.__getitem__, keys))

    def _find(self, node: int) -> StepAlone:
        graph, chunk = self._graph, self._chunk_elements[node]
        count = chunk_count(graph, node, chunk)
        writes = (graph.operation(node).kind is not Kind.COPY) * len(graph.results(node))
        bytes_read, demand, staged = [], count * writes, 0
        sources = chunked_sources(graph, node, chunk, self._slot)
        for place, source in zip(graph.places(node), sources, strict=True):
            chunks = count if source.chunk_length else min(count, 1)
            step = chunk if source.chunk_length else length(graph, node)
            bytes_read.append(bytes_of_chunks(graph, node, place, max(1, step), 0, chunks))
            staged += bytes_of_chunks(graph, node, place, max(1, step), 0, chunks, zeros=True)
            demand += chunks
        slots = writes + len(sources) if count else 0
        computes = graph.operation(node).kind is Kind.MERGE
        return StepAlone(tuple(bytes_read), sum(bytes_read), staged, slots, demand, computes)
