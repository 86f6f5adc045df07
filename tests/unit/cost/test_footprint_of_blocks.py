"""Kernels that encode blocks take the memory that was planned, with compiled loops and with torch."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from mergeloom.engine.cost.kernel_class import kernel_class
from mergeloom.engine.cost.measure_torch_memory import allocations, footprint
from mergeloom.engine.execute.compute.torch_computer import Piece, combine_chunk
from mergeloom.engine.graph.graph import Kind, Operation
from mergeloom.io.tensors.dtypes import DTYPES, F32
from mergeloom.methods.formats.fp8_encoder import FP8_BLOCKS
from mergeloom.methods.kernel.fused.compiled import Compiled
from mergeloom.methods.kernel.fused.passes import FusedPass
from mergeloom.methods.kernel.fused.run import Chunk
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.spec import InputSpec
from mergeloom.methods.kernel.torch_backend.tile import Workspace
from tests.support.methods.fp8_reference import hard_values

MIB = 1 << 20
SHAPE = (1024, 512)
ELEMENTS = 1024 * 512


def encoder(rows: int, columns: int, scales: str = "F32") -> Kernel:
    """An encoder of blocks of a size."""
    parameters = {"rows": rows, "columns": columns, "scale_dtype": scales}
    return FP8_BLOCKS.kernel(InputSpec(1, None, SHAPE), parameters)


@pytest.mark.parametrize("blocks", [(128, 128), (1, 32), (1, 1)])
def test_compiled_loops_allocate_no_more_than_was_planned(blocks: tuple[int, int]) -> None:
    kernel = encoder(*blocks)
    compiled = Compiled(kernel, ["F32"], "F8_E4M3", "F32")
    compiled.prepare()
    scratch = np.empty(compiled.scratch, np.uint8)
    chunk = Chunk([memoryview(hard_values(SHAPE, 1).view(torch.uint8).numpy())], 0, ELEMENTS, 5, (0,))
    outs = np.empty(ELEMENTS, np.uint8), np.empty(4 * kernel.written(1, 0, ELEMENTS)[1], np.uint8)
    tracemalloc.start()
    FusedPass(compiled, None, None, scratch).combine(chunk, *outs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= compiled.allocated


@pytest.mark.parametrize("blocks", [(128, 128), (1, 32), (1, 1)])
def test_a_tile_takes_what_was_planned(blocks: tuple[int, int]) -> None:
    kernel = encoder(*blocks)
    outs = DTYPES["F8_E4M3"], F32
    found = footprint(Operation(Kind.MERGE, "fp8 blocks", kernel=kernel), [F32], outs)
    assert found.workspace.at(ELEMENTS) <= kernel.workspace(ELEMENTS, 4)
    piece = Piece(kernel, [hard_values(SHAPE, 1).view(-1)], 0, 5, (0,), ELEMENTS, ELEMENTS)
    space = Workspace(torch.empty(kernel.workspace(ELEMENTS, 4), dtype=torch.uint8), torch.float32)
    results = [
        torch.empty(ELEMENTS, dtype=torch.float8_e4m3fn),
        torch.empty(kernel.written(1, 0, ELEMENTS)[1], dtype=torch.float32),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with allocations() as taken:
            combine_chunk(piece, None, space, results)
    finally:
        torch.set_num_threads(threads)
    assert taken.peak <= found.allocated.at(ELEMENTS) + MIB


def test_encoders_with_blocks_of_other_heights_are_measured_on_their_own() -> None:
    assert kernel_class(encoder(128, 128)) == kernel_class(encoder(128, 64))
    assert kernel_class(encoder(128, 128)) != kernel_class(encoder(1, 128))
    assert kernel_class(encoder(128, 128)) != kernel_class(encoder(128, 128, "F8_E8M0"))
