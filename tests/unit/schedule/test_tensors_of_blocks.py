"""Tensors with one element per block of another one: which of their bytes are made with a range of elements."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeloom.engine.graph.encoding.blocks import BlockEncoders
from mergeloom.engine.graph.extents import bytes_before, made, most_made
from mergeloom.engine.graph.graph import Kind, MergeGraph, Operation
from mergeloom.engine.schedule.tiling import alignment_of, chunk_count, widest
from mergeloom.io.tensors.dtypes import BF16, DTYPES, F32, DType
from mergeloom.io.tensors.refs import TensorRef
from mergeloom.methods import merge_methods
from mergeloom.methods.kernel.access import BlockRows
from mergeloom.methods.kernel.spec import InputSpec

Shape = tuple[int, ...]


def graph_of(shape: Shape, blocks: BlockRows, scales: DType = F32) -> tuple[MergeGraph, int, int]:
    """A graph with a merge of two tensors that is stored as blocks, and the nodes of its codes and scales."""
    graph = MergeGraph(("a", "b"))
    nbytes = BF16.nbytes(InputSpec(1, None, shape).rows * shape[-1])
    reads = tuple(
        graph.add_read(model, "w", TensorRef(Path(name), 0, nbytes, BF16, shape)) for model, name in enumerate("ab")
    )
    kernel = merge_methods()["linear"].kernel(InputSpec(2, None, shape), {"weight": (0.5, 0.5)})
    node = graph.add_node(Operation(Kind.MERGE, "linear", kernel=kernel), reads, BF16)
    codes, found = BlockEncoders(graph).fp8(node, blocks, scales)
    return graph, codes, found


@pytest.mark.parametrize(
    ("shape", "blocks", "scales"),
    [
        ((576, 7168), BlockRows(128, 128), (5, 56)),
        ((3, 70, 96), BlockRows(32, 64), (3, 3, 2)),
        ((2, 3, 64, 96), BlockRows(32, 96), (2, 3, 2, 1)),
        ((300,), BlockRows(128, 128), (3,)),
    ],
)
def test_the_ranges_of_chunks_follow_each_other(shape: Shape, blocks: BlockRows, scales: Shape) -> None:
    graph, codes, found = graph_of(shape, blocks)
    assert graph.shape(found) == scales
    assert graph.results(codes) == (codes, found)
    for chunk in (alignment_of(graph, codes), 2 * alignment_of(graph, codes)):
        for node, width in ((codes, 1), (found, 4)):
            end = 0
            for number in range(chunk_count(graph, codes, chunk)):
                first = number * chunk
                size = min(chunk, graph.elements(codes) - first)
                assert bytes_before(graph, node, first) == end
                offset, nbytes = made(graph, node, first, size)
                assert offset == end
                assert nbytes <= (most_made(graph, codes, size) if node == found else size * width)
                end += nbytes
            assert end == graph.nbytes(node)
            assert bytes_before(graph, node, 2 * graph.elements(codes)) == end


def test_a_row_of_blocks_has_its_scales() -> None:
    graph, _, scales = graph_of((576, 7168), BlockRows(128, 128))
    assert made(graph, scales, 128 * 7168, 2 * 128 * 7168) == (56 * 4, 2 * 56 * 4)
    assert made(graph, scales, 512 * 7168, 64 * 7168) == (4 * 56 * 4, 56 * 4)


def test_chunks_are_not_cut_for_scales_in_a_wider_dtype() -> None:
    """The scales of a chunk are a few bytes."""
    graph, codes, _ = graph_of((576, 7168), BlockRows(128, 128))
    assert widest(graph, codes) == 2
    assert most_made(graph, codes, 128 * 7168) == 2 * 56 * 4  # any 129 rows touch two rows of blocks at most


def test_equal_values_are_encoded_once() -> None:
    graph, codes, scales = graph_of((64, 64), BlockRows(32, 32))
    encoders, before = BlockEncoders(graph), len(graph.node_operation)
    node = ~graph.node_sources[codes][0]
    other = encoders.fp8(node, BlockRows(32, 32), DTYPES["F8_E8M0"], power_of_two=False)
    assert encoders.fp8(node, BlockRows(32, 32), DTYPES["F8_E8M0"]) == other
    assert other != (codes, scales)
    assert len(graph.node_operation) == before + 2


def test_a_tensor_with_another_number_of_elements_is_refused() -> None:
    graph, codes, _ = graph_of((64, 96), BlockRows(32, 32))
    with pytest.raises(ValueError, match=r"shape \[2, 2\] cannot be computed with one of \[64, 96\] by BlockRows"):
        graph.add_results(codes, [(F32, (2, 2))])
