"""Chunks of transposed matrices: of equal lengths, and long enough that the ranges of stored rows are long."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeloom.engine.graph.graph import Kind, MergeGraph, Operation
from mergeloom.engine.schedule.budget import Budget, DeviceBudget
from mergeloom.engine.schedule.schedule import SLOT_BYTES, TURNED_SLOT_BYTES, make_schedule
from mergeloom.engine.schedule.tiling import chunk_elements
from mergeloom.io.tensors.dtypes import BF16
from mergeloom.io.tensors.refs import TensorRef
from mergeloom.methods import merge_methods
from mergeloom.methods.kernel.access import ALIGNED, TransposedSlice
from mergeloom.methods.kernel.spec import BLOCK, InputSpec

CPU = (DeviceBudget("cpu", None, 2),)


def graph_of(matrices: int, rows: int, columns: int, *, turned: bool = True) -> MergeGraph:
    """The graph of a stack of matrices that is stored transposed."""
    shape, part = (matrices, rows, columns), (matrices, columns, rows) if turned else (matrices, rows, columns)
    access = TransposedSlice(0, rows, 1, rows * columns) if turned else ALIGNED
    kernel = merge_methods()["passthrough"].kernel(InputSpec(1, None, shape, (access,), (part,)), {})
    graph = MergeGraph(("model",))
    nbytes = 2 * matrices * rows * columns
    read = graph.add_read(0, "stored", TensorRef(Path("a"), 0, nbytes, BF16, part))
    operation = Operation(Kind.MERGE, "passthrough", kernel=kernel)
    graph.add_output("value", graph.add_node(operation, (read,), BF16, shape=shape), 0)
    return graph


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (40, 5),  # 7 fit, and 5 divide 40
        (43, 7),  # no number near 7 divides a prime
        (3, 6),  # two complete matrices
        (1, 7),
    ],
)
def test_chunks_divide_matrices_evenly(units: int, expected: int) -> None:
    rows = BLOCK // 256  # rows of 256 columns in a unit of chunks
    slot = 2 * 8 * BLOCK
    assert chunk_elements(graph_of(12, units * rows, 256), slot) == [expected * BLOCK]
    assert chunk_elements(graph_of(12, units * rows, 256, turned=False), slot) == [8 * BLOCK]


def test_slots_are_large_if_there_is_room() -> None:
    for ram, turned, expected in (
        (8 << 30, True, TURNED_SLOT_BYTES),
        (8 << 30, False, SLOT_BYTES),
        (256 << 20, True, 32 << 20),  # two tensors of a chunk, for each of four in flight
    ):
        graph = graph_of(16, 4096, 2048, turned=turned)
        assert make_schedule(graph, Budget(ram, 0, CPU)).slot_bytes == expected
