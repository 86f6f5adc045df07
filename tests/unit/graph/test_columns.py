"""Columns are sequences like lists of objects, in a few bytes for each."""

from __future__ import annotations

import tracemalloc
from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeloom.engine.graph.columns.outputs import Output, Outputs
from mergeloom.engine.graph.columns.reads import Reads
from mergeloom.engine.graph.columns.rows import Rows, grouped
from mergeloom.engine.graph.graph import Kind, MergeGraph, Operation
from mergeloom.io.tensors.dtypes import BF16, F32
from mergeloom.io.tensors.refs import TensorClass, TensorRef
from mergeloom.io.tensors.table import TensorTable
from mergeloom.methods.kernel.access import Slice

BYTES_OF_A_NODE = 180
"""The most memory that a node may take with its two reads and its output in a graph, besides the names, in bytes."""

OUTPUTS = st.lists(
    st.builds(Output, st.text(max_size=2), st.integers(0, 5), st.integers(0, 3), st.sampled_from(["", "s"]))
)


@given(OUTPUTS)
def test_outputs_are_a_sequence(expected: list[Output]) -> None:
    found = Outputs()
    for output in expected:
        found.add(output.name, output.node, output.group, output.folder)
    assert len(found) == len(expected)
    assert list(found) == expected
    assert found[:] == expected
    assert [found[-number] for number in range(1, len(expected) + 1)] == expected[::-1]
    assert [found.label(number) for number in range(len(expected))] == [output.label for output in expected]
    assert found.folders == list(dict.fromkeys(output.folder for output in expected))
    for folder in ("", "s", "t"):
        assert list(found.in_folder(folder)) == [n for n, output in enumerate(expected) if output.folder == folder]
    assert list(found.of_nodes("abcdef")) == ["abcdef"[output.node] for output in expected]
    with pytest.raises(IndexError):
        found[len(expected)]


REFS = st.builds(
    lambda file, offset, dtype, shape: TensorRef(Path(file), offset, dtype.nbytes(prod(shape)), dtype, shape),
    st.sampled_from("ab"),
    st.integers(0, 2**50),
    st.sampled_from([BF16, F32]),
    st.lists(st.integers(0, 3), max_size=2).map(tuple),
)


class OtherRef(TensorRef):
    """A reference of another type."""


@given(st.lists(REFS), st.sets(st.integers(0, 5)))
def test_reads_are_a_sequence(expected: list[TensorRef], others: set[int]) -> None:
    expected = [
        OtherRef(ref.file, ref.offset, ref.nbytes, ref.dtype, ref.shape) if number in others else ref
        for number, ref in enumerate(expected)
    ]
    found = Reads()
    for ref in expected:
        found.append(ref)
    assert list(found) == expected
    assert [type(ref) for ref in found] == [type(ref) for ref in expected]
    assert found[1:] == expected[1:]
    assert [found[-number] for number in range(1, len(expected) + 1)] == expected[::-1]
    files, offsets = found.places()
    for number, ref in enumerate(expected):
        assert found.class_of(number).shape == ref.shape
        assert (found.files[files[number]], offsets[number]) == (ref.file, ref.offset)


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3).map(tuple)))
def test_rows_are_a_sequence(expected: list[tuple[int, ...]]) -> None:
    found = Rows()
    for row in expected:
        found.append(row)
    assert list(found) == expected
    assert found[::2] == expected[::2]
    assert [found[-number] for number in range(1, len(expected) + 1)] == expected[::-1]
    with pytest.raises(IndexError):
        found[len(expected)]


@given(*[st.lists(st.lists(st.integers(-3, 9), max_size=3).map(tuple), max_size=4)] * 2, st.integers(-3, 9))
def test_rows_are_extended_and_searched(
    expected: list[tuple[int, ...]], more: list[tuple[int, ...]], value: int
) -> None:
    found = Rows(expected)
    found.extend([each for row in more for each in row], list(map(len, more)))
    expected = expected + more
    assert list(found) == expected
    assert list(found.having(value)) == [n for n, row in enumerate(expected) for each in row if each == value]
    filled = [n for n, row in enumerate(expected) if row]
    assert list(found.firsts(filled)) == [expected[n][0] for n in filled]
    assert list(map(tuple, found.of(filled))) == [expected[n] for n in filled]


@given(st.lists(st.integers(0, 4)))
def test_groups_have_their_members_in_order(keys: list[int]) -> None:
    members = [10 + position for position in range(len(keys))]
    found = grouped(keys, members, 5)
    assert [list(group) for group in found] == [
        [member for key, member in zip(keys, members, strict=True) if key == number] for number in range(5)
    ]


def test_a_node_takes_little_memory() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{e}.up_proj.weight" for layer in range(20) for e in range(256)]
    operation = Operation(Kind.REQUIRE_EQUAL, "linear")
    table = TensorTable()
    table.add(Path("x"), names, [TensorClass(F32, (1,), 4)] * len(names), range(0, 4 * len(names), 4))
    tracemalloc.start()
    graph = MergeGraph(("a", "b"))
    for name in names:
        pair = [graph.add_stored(model, name, table) for model in range(2)]
        graph.add_output(name, graph.add_node(operation, tuple(pair), F32), 0)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(graph.class_nodes) == 1
    assert used <= len(names) * BYTES_OF_A_NODE


def test_nodes_are_of_one_class_if_nothing_but_their_values_differs() -> None:
    graph = MergeGraph(("a",))
    shapes = [(4,), (4,), (5,), (4,)]
    reads = [graph.add_read(0, f"t{n}", TensorRef(Path("x"), n, 4, F32, shape)) for n, shape in enumerate(shapes)]
    operation, other = Operation(Kind.REQUIRE_EQUAL, "linear"), Operation(Kind.REQUIRE_EQUAL, "ties")
    pairs = [(0, 1), (1, 0), (2, 2), (0, 0), (3, 1)]
    nodes = [graph.append_node(operation, (reads[a], reads[b]), F32) for a, b in pairs]
    nodes.append(graph.append_node(other, (reads[0], reads[1]), F32))
    nodes.append(graph.append_node(operation, (reads[0], reads[1]), BF16))
    assert list(graph.node_class) == [0, 0, 1, 2, 0, 3, 4]
    assert graph.class_nodes == [0, 2, 3, 5, 6]
    assert graph.by_class(lambda node: graph.node_sources[node]) == [
        graph.node_sources[n] for n in (0, 0, 2, 3, 0, 5, 6)
    ]
    graph.add_results(nodes[1], [(BF16, (4,))])
    found = list(graph.node_class)
    assert found[0] == found[4] != found[1]
    assert graph.total(lambda node: 10 + node, nodes) == 2 * 10 + (10 + 1) + sum(10 + n for n in (2, 3, 5, 6))


def test_a_node_can_be_added_before_one_that_it_uses() -> None:
    graph = MergeGraph(("a",))
    read = graph.add_read(0, "t", TensorRef(Path("x"), 0, 4, F32, (1,)))
    operation = Operation(Kind.MERGE, "linear")
    first = graph.append_node(operation, (~1,), F32, shape=(1,))
    second = graph.append_node(operation, (read,), F32)
    assert graph.node_class[first] != graph.node_class[second]
    assert graph.users() == {second: [first]}


def test_slices_of_one_tensor_with_other_shapes_are_other_nodes() -> None:
    graph = MergeGraph(("model",))
    read = graph.add_read(0, "experts", TensorRef(Path("m"), 0, 96, F32, (6, 4)))
    slices = Operation(Kind.COPY, "passthrough", copied=(Slice(0, 4),))
    nodes = [graph.add_node(slices, (read,), F32, shape=shape) for shape in ((2, 4), (3, 4), (2, 4), (3, 4))]
    assert nodes == [0, 1, 0, 1]
    assert [graph.shape(node) for node in nodes[:2]] == [(2, 4), (3, 4)]
