"""Measures the throughput of a GPU: of a kernel's passes, and of copies to it and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from ...methods.kernel.kernel import Kernel
from ...methods.kernel.torch_backend.tile import Workspace
from ..execute.compute.torch_computer import Piece, check_inputs, combine_chunk, reduce_chunk, torch_dtype
from ..schedule.tiling import work_bytes
from .workload import Workload

_COPY = 64 << 20


def has_cuda() -> bool:
    """Return whether torch finds a GPU."""
    return torch.cuda.is_available()


def gpu_passes(
    work: Workload, node: int, kernel: Kernel, inputs: Sequence[bytearray], device: str
) -> Callable[[int], None]:
    """Return a function that runs all passes of a kernel over one chunk, as the engine does, and waits for the GPU.

    Args:
        work: work of the merge.
        node: number of the node.
        kernel: kernel of the node, for the elements of the chunk.
        inputs: bytes of each input.
        device: name of the GPU.
    """
    graph = work.graph
    dtypes = [torch_dtype(graph.value_dtype(value)) for value in graph.node_sources[node]]
    tensors = [torch.frombuffer(data, dtype=dtype).to(device) for data, dtype in zip(inputs, dtypes, strict=True)]
    elements = kernel.inputs.rows * kernel.inputs.columns
    tile = max(1, work.schedule.tile_elements[0] // kernel.alignment) * kernel.alignment
    nbytes = kernel.workspace(min(tile, elements), work_bytes(graph, node))
    measured = graph.footprints.get(graph.node_class[node])
    if measured is not None:
        nbytes = max(nbytes, measured.workspace.at(min(tile, elements)))
    memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
    outs = [torch.empty(elements, dtype=torch_dtype(dtype), device=device) for dtype in graph.result_dtypes(node)]
    positions = graph.operation(node).positions or tuple(range(len(tensors)))
    piece = Piece(kernel, tensors, 0, graph.node_key[node], positions, tile, elements)

    def run(thread: int) -> None:
        workspace, state = Workspace(memory, torch.float32), None
        if not kernel.propagates_nonfinite:
            check_inputs(piece, workspace)
        for index in range(kernel.reductions):
            if kernel.needed(index, state):
                state = kernel.finish(index, reduce_chunk(piece, index, state, workspace), state)
        combine_chunk(piece, state, workspace, outs)
        torch.cuda.synchronize()

    return run


def measure_copies(name: str) -> tuple[float, float]:
    """Measure copies to a GPU and back, from and to pinned memory, in bytes per second."""
    host = torch.empty(_COPY, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(_COPY, dtype=torch.uint8, device=name)
    measured = []
    for target, source in ((device, host), (host, device)):
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(name)
        start = time.perf_counter()
        for _ in range(8):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(name)
        measured.append(8 * _COPY / (time.perf_counter() - start))
    return measured[0], measured[1]
