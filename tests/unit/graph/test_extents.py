"""Extents, chunks and orders of random task graphs, compared with what each element needs."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeloom.engine.graph.extents import by_element, bytes_of_chunks, extent, length, staged_bytes, staged_whole
from mergeloom.engine.graph.graph import MergeGraph
from mergeloom.engine.schedule.order import orders
from mergeloom.engine.schedule.tiling import chunk_elements
from mergeloom.methods.kernel.access import Access, FactorAccess
from tests.examples import examples
from tests.support.blueprints import CPU
from tests.support.methods.oracle_accesses import expanded, factor
from tests.support.tasks.drawn import task_worlds
from tests.support.tasks.laws import smallest_slot
from tests.support.tasks.world import TaskWorld


def needed(graph: MergeGraph, node: int, place: int) -> list[np.ndarray]:
    """For each row of a node's output, the elements of a source that it needs, in any order; -1 for zeros."""
    access: Access = graph.access(node, place)
    shape, part = graph.shape(node), graph.value_shape(graph.node_sources[node][place])
    rows = math.prod(shape[:-1])
    numbers = np.arange(math.prod(part), dtype=np.float64).reshape(part) + 1  # the oracle's zeros are 0
    if isinstance(access, FactorAccess):
        lines = factor(numbers, access, shape).astype(np.int64) - 1
        if access.by_row:
            return list(lines.reshape(rows, -1))
        return [matrix.reshape(-1) for matrix in lines for _ in range(rows // len(lines))]
    return list(expanded(numbers, access, shape).reshape(rows, shape[-1]).astype(np.int64) - 1)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(task_worlds(groups=1), st.data())
def test_ranges_hold_what_each_element_needs(world: TaskWorld, data: st.DataObject) -> None:
    graph = world.graph
    node = data.draw(st.sampled_from(graph.tasks()))
    place = data.draw(st.integers(0, len(graph.node_sources[node]) - 1))
    total = length(graph, node)
    if not by_element(graph, node) or not total:
        return
    first = data.draw(st.integers(0, total - 1))
    count = data.draw(st.integers(1, min(total - first, 3000)))
    width = graph.value_dtype(graph.node_sources[node][place]).bits // 8
    ranges = extent(graph, node, place, first, count)
    held = {n for offset, nbytes in ranges if offset >= 0 for n in range(offset // width, (offset + nbytes) // width)}
    by_row, columns = needed(graph, node, place), graph.shape(node)[-1]
    for row in range(first // columns, (first + count - 1) // columns + 1):
        own = by_row[row]
        if len(own) == columns and not isinstance(graph.access(node, place), FactorAccess):
            own = own[max(0, first - row * columns) : first + count - row * columns]
        assert held >= set(own[own >= 0].tolist())
    assert all(offset % width == nbytes % width == 0 for offset, nbytes in ranges if offset >= 0)
    assert sum(nbytes for _, nbytes in ranges) <= staged_bytes(graph, node, place, count)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(task_worlds(), st.data())
def test_bytes_of_chunks_are_those_of_their_ranges(world: TaskWorld, data: st.DataObject) -> None:
    graph = world.graph
    chunks = chunk_elements(graph, smallest_slot(world, CPU))
    for node in graph.tasks():
        count = -(-length(graph, node) // chunks[node])
        begin, end = sorted(data.draw(st.lists(st.integers(0, count), min_size=2, max_size=2)))
        for place in range(len(graph.node_sources[node])):
            found = [
                each
                for chunk in range(begin, end)
                for each in extent(
                    graph,
                    node,
                    place,
                    chunk * chunks[node],
                    min(chunks[node], length(graph, node) - chunk * chunks[node]),
                )
            ]
            stored = sum(nbytes for offset, nbytes in found if offset >= 0)
            assert bytes_of_chunks(graph, node, place, chunks[node], begin, end) == stored
            everything = bytes_of_chunks(graph, node, place, chunks[node], begin, end, zeros=True)
            assert everything == sum(nbytes for _, nbytes in found)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(task_worlds(), st.sampled_from([1, 2, 16]))
def test_every_source_of_every_chunk_fits_a_slot(world: TaskWorld, times: int) -> None:
    graph, slot = world.graph, times * smallest_slot(world, CPU)
    chunks = chunk_elements(graph, slot)
    for node in graph.tasks():
        total, chunk = length(graph, node), chunks[node]
        assert chunk >= 1
        width = graph.node_dtype[node].bits // 8 if by_element(graph, node) else 1
        assert min(chunk, total) * width <= slot
        for place, value in enumerate(graph.node_sources[node]):
            if value < 0:
                assert chunks[~value] == chunk, "linked tasks have chunks of two lengths"
            if staged_whole(graph, node, place, slot):
                assert staged_bytes(graph, node, place, total) <= slot
                continue
            for first in range(0, total, chunk):
                ranges = extent(graph, node, place, first, min(chunk, total - first))
                assert sum(nbytes for _, nbytes in ranges) <= slot


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(task_worlds())
def test_each_task_comes_after_those_that_it_uses(world: TaskWorld) -> None:
    for order in orders(world.graph):
        assert sorted(order) == list(world.graph.tasks())
        position = {node: number for number, node in enumerate(order)}
        for node in order:
            assert all(position[~value] < position[node] for value in world.graph.node_sources[node] if value < 0)
