"""Sums that chunks bring in any order are exact, and independent of the chunks and of interruptions."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction
from pathlib import Path

import pytest

from mergeloom.engine.execute.survival import Prefix, SurvivalSums, block_elements, compared_nodes, expansion
from mergeloom.engine.graph.graph import Kind, MergeGraph, Operation
from mergeloom.io.tensors.dtypes import DTYPES
from mergeloom.io.tensors.refs import TensorRef
from mergeloom.methods import merge_methods
from mergeloom.methods.kernel.reduction.survival import Compared
from mergeloom.methods.kernel.spec import BLOCK, InputSpec

BLOCKS = 11
ELEMENTS = (BLOCKS - 1) * BLOCK + 100


def graph_of(elements: int = ELEMENTS) -> tuple[MergeGraph, int]:
    """A graph with a node that is not compared with the base, and one that is."""
    graph = MergeGraph(("base", "a"))
    shape = (elements,)
    dtype = DTYPES["BF16"]
    refs = [TensorRef(Path(name), 0, dtype.nbytes(elements), dtype, shape) for name in graph.models]
    reads = tuple(graph.add_read(model, "w", ref) for model, ref in enumerate(refs))
    method, spec, parameters = merge_methods()["task_arithmetic"], InputSpec(2, 0, shape), {"weight": (0.0, 0.5)}
    for traced in (method, Compared(method, 0, "bfloat16")):
        kernel = traced.kernel(spec, parameters)
        operation = Operation(Kind.MERGE, "task_arithmetic", base=0, kernel=kernel)
        graph.append_node(operation, reads, dtype)
    return graph, 1


def drawn(seed: int) -> list[list[float]]:
    """Two sums of each block, of many magnitudes."""
    numbers = random.Random(seed)
    return [[math.ldexp(numbers.uniform(-1, 1), numbers.randint(-300, 300)) for _ in range(BLOCKS)] for _ in range(2)]


def chunk(blocks: list[list[float]], first: int, end: int) -> tuple[int, int, list[list[float]]]:
    """The first element, the number of elements and the sums of a chunk of some blocks."""
    begin = first * BLOCK
    return begin, min(end * BLOCK, ELEMENTS) - begin, [each[first:end] for each in blocks]


@pytest.mark.parametrize("seed", range(5))
def test_an_expansion_is_exact(seed: int) -> None:
    values = drawn(seed)[0]
    parts = expansion(values)
    assert sum(map(Fraction, parts)) == sum(map(Fraction, values))
    assert len(parts) < len(values)
    assert parts[0] == math.fsum(values)
    assert list(parts) == sorted(parts, key=abs, reverse=True)


def test_expansions_of_special_values() -> None:
    assert expansion([]) == expansion([1.0, -1.0]) == ()
    for values in ([math.inf], [math.nan, 1.0], [math.inf, -math.inf], [1.7e308, 1.7e308]):
        assert math.isnan(expansion(values)[0])
    assert expansion([1.0, 5e-324]) == (1.0, 5e-324)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_chunks_does_not_matter(seed: int) -> None:
    graph, node = graph_of()
    blocks, numbers = drawn(seed), random.Random(seed)
    assert list(compared_nodes(graph)) == [node]
    assert block_elements(graph, node) == BLOCK
    cuts = [0, *sorted(numbers.sample(range(1, BLOCKS), 4)), BLOCKS]
    chunks = [chunk(blocks, *bounds) for bounds in itertools.pairwise(cuts)]
    numbers.shuffle(chunks)
    for journaled in (False, True):
        sums = SurvivalSums(graph, journaled=journaled)
        for number, each in enumerate(chunks):
            assert sums.total(node) is None, number
            sums.add(node, *each)
        assert sums.total(node) == tuple(map(math.fsum, blocks))
        assert sums.total(0) is None


@pytest.mark.parametrize("seed", range(5))
def test_sums_continue_where_an_earlier_run_ended(seed: int) -> None:
    """The next run begins at or before the end of what is known, with other chunks."""
    graph, node = graph_of()
    blocks, numbers = drawn(seed), random.Random(seed)
    known: Prefix | None = None
    for end in (3, 7, 9):
        sums = SurvivalSums(graph, {} if known is None else {node: known}, journaled=True)
        start = 0 if known is None else numbers.randint(0, known.elements // BLOCK)
        sums.add(node, *chunk(blocks, start, end))
        assert sums.total(node) is None
        assert sums.durable(node, end * BLOCK - 1) is None
        known = sums.durable(node, end * BLOCK)
        assert known is not None
        assert known.elements == end * BLOCK
        assert sums.durable(node, end * BLOCK) is None
    sums = SurvivalSums(graph, {node: known}, journaled=True)
    sums.add(node, *chunk(blocks, 9, BLOCKS))
    assert sums.total(node) == tuple(map(math.fsum, blocks))
    last = sums.durable(node, ELEMENTS)
    assert last is not None
    assert SurvivalSums(graph, {node: last}, journaled=True).total(node) == sums.total(node)


def test_only_sums_over_durable_elements_are_journaled() -> None:
    graph, node = graph_of()
    blocks = drawn(9)
    sums = SurvivalSums(graph, journaled=True)
    for bounds in ((0, 2), (2, 5), (5, BLOCKS)):
        sums.add(node, *chunk(blocks, *bounds))
    assert sums.durable(node, 2 * BLOCK - 1) is None
    first = sums.durable(node, 5 * BLOCK - 1)
    assert first == Prefix(2 * BLOCK, tuple(expansion(each[:2]) for each in blocks))
    second = sums.durable(node, 5 * BLOCK)
    assert second is not None
    assert second.elements == 5 * BLOCK
    assert sums.durable(node, ELEMENTS - 1) is None
    last = sums.durable(node, ELEMENTS)
    assert last is not None
    assert last.elements == ELEMENTS
    assert sums.durable(node, ELEMENTS) is None
    assert sums.total(node) == tuple(math.fsum(each) for each in last.sums)


def test_what_is_known_completely_ignores_more() -> None:
    graph, node = graph_of()
    blocks = drawn(4)
    known = Prefix(ELEMENTS, ((1.0,), ()))
    sums = SurvivalSums(graph, {node: known}, journaled=True)
    assert sums.total(node) == (1.0, 0.0)
    sums.add(node, *chunk(blocks, 0, 4))
    assert sums.total(node) == (1.0, 0.0)
    assert sums.durable(node, ELEMENTS) is None


def test_a_sum_that_is_not_finite_stays_so() -> None:
    graph, node = graph_of()
    sums = SurvivalSums(graph)
    for number in range(BLOCKS):
        sums.add(node, *chunk([[math.inf if number == 2 else 1.0] * BLOCKS, [1.0] * BLOCKS], number, number + 1))
    total = sums.total(node)
    assert total is not None
    assert math.isnan(total[0])
    assert total[1] == BLOCKS
