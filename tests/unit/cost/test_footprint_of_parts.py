"""Kernels whose inputs are stored parts take the memory that was planned, with compiled loops and with torch."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mergeloom.engine.cost.measure_torch_memory import allocations, footprint
from mergeloom.engine.execute.compute.torch_computer import Piece, check_inputs, combine_chunk, reduce_chunk
from mergeloom.engine.graph.graph import Kind, Operation
from mergeloom.io.tensors.dtypes import BF16, DTYPES
from mergeloom.methods.kernel.fused.compiled import Compiled
from mergeloom.methods.kernel.fused.passes import FusedPass
from mergeloom.methods.kernel.fused.run import Chunk
from mergeloom.methods.kernel.torch_backend.tile import Workspace
from tests.support.methods.kernels import NAMES, staged_elements
from tests.support.methods.stored import KINDS, Maker, merged

MIB = 1 << 20
SHAPE = (1024, 512)
ELEMENTS = 1024 * 512
TIES = {"weight": (0.0, 0.5, 0.3), "density": (1.0, 0.4, 0.7)}
KERNEL, PARTS = merged(
    "ties", [KINDS[kind](Maker(1, SHAPE)) for kind in ("fp8_blocks", "adapted", "transposed")], SHAPE, TIES, 0
)
STAGED = [staged_elements(KERNEL.inputs, number, part, 0, ELEMENTS) for number, part in enumerate(PARTS)]
POSITIONS = range(len(PARTS))


def run(reduce: Callable[[int, Any], Any], measured: Callable[[Callable[[], Any]], Any]) -> Any:
    """Run the passes before the last one; returns the state."""
    state: Any = None
    for index in range(KERNEL.reductions):
        if KERNEL.needed(index, state):
            partial = measured(lambda index=index, state=state: reduce(index, state))
            state = KERNEL.finish(index, partial, state)
    return state


def test_compiled_loops_allocate_no_more_than_was_planned() -> None:
    compiled = Compiled(KERNEL, [NAMES[part.dtype] for part in PARTS], "BF16")
    compiled.prepare()
    scratch = np.empty(compiled.scratch, np.uint8)
    chunk = Chunk([memoryview(x.view(torch.uint8).numpy()) for x in STAGED], 0, ELEMENTS, 5, POSITIONS)
    out = np.empty(2 * ELEMENTS, np.uint8)
    peaks = []

    def measured(work: Callable[[], Any]) -> Any:
        tracemalloc.start()
        result = work()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        return result

    state = run(lambda index, state: FusedPass(compiled, index, state, scratch).reduce(chunk), measured)
    measured(lambda: FusedPass(compiled, None, state, scratch).combine(chunk, out))
    assert max(peaks) <= compiled.allocated
    assert max(peaks) > compiled.allocated // 8  # the sample


def test_a_tile_takes_what_was_planned() -> None:
    dtypes = [DTYPES[NAMES[part.dtype]] for part in PARTS]
    found = footprint(Operation(Kind.MERGE, "ties", kernel=KERNEL), dtypes, (BF16,))
    assert found.workspace.at(ELEMENTS) <= KERNEL.workspace(ELEMENTS, 4)
    piece = Piece(KERNEL, STAGED, 0, 5, POSITIONS, ELEMENTS, ELEMENTS)
    space = Workspace(torch.empty(KERNEL.workspace(ELEMENTS, 4), dtype=torch.uint8), torch.float32)
    out = torch.empty(ELEMENTS, dtype=torch.bfloat16)  # which is planned elsewhere
    peaks = []

    def measured(work: Callable[[], Any]) -> Any:
        with allocations() as taken:
            result = work()
        peaks.append(taken.peak)
        return result

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured(lambda: check_inputs(piece, space))
        state = run(lambda index, state: reduce_chunk(piece, index, state, space), measured)
        measured(lambda: combine_chunk(piece, state, space, [out]))
    finally:
        torch.set_num_threads(threads)
    assert max(peaks) <= found.allocated.at(ELEMENTS) + MIB
