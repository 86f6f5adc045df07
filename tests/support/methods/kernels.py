"""Makes merge kernels from functions, and runs kernels over tiles of any size without the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergeloom.io.safetensors.dtypes import DTYPES, Kind
from mergeloom.methods import Array, Inputs, merge_methods
from mergeloom.methods.kernel.fused.compiled import Compiled
from mergeloom.methods.kernel.fused.passes import FusedPass
from mergeloom.methods.kernel.fused.run import Chunk
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.method import Method
from mergeloom.methods.kernel.spec import Absent, Base, InputSpec, Unit
from mergeloom.methods.kernel.torch_backend.passes import Pass
from mergeloom.methods.kernel.torch_backend.tile import Tile, Workspace


def method_of(function: Callable[[Inputs], Array]) -> Method:
    """A merge method without parameters that is not registered."""
    return Method(
        name=function.__name__,
        summary="",
        description="",
        paper=None,
        base=Base.OPTIONAL,
        minimum=0,
        maximum=None,
        absent=Absent.PRESENT,
        parameters=(),
        function=function,
    )


def kernel_of(function: Callable[[Inputs], Array], count: int, base: int | None, shape: tuple[int, ...]) -> Kernel:
    """The kernel of a function of the inputs."""
    return method_of(function).kernel(InputSpec(count, base, shape), {})


@dataclass
class Run:
    """The result of running a kernel.

    Args:
        output: merged tensor in the work dtype.
        passes: number of passes over the tiles.
        declared: declared workspace of the largest tile in bytes.
        used: peak use of the workspace in bytes.
    """

    output: Tensor
    passes: int
    declared: int
    used: int


@dataclass
class FusedRun:
    """The result of running a kernel's compiled loops.

    Args:
        output: bytes of the merged tensor.
        passes: number of passes over the chunks.
        beyond: whether a value is NaN or beyond the largest number of the dtype.
    """

    output: bytes
    passes: int
    beyond: bool


NAMES = {
    getattr(torch, dtype.torch_name): name
    for name, dtype in DTYPES.items()
    if dtype.torch_name and dtype.kind is Kind.FLOAT
}
"""The names of floating-point dtypes in a safetensors header."""


def run_kernel(
    kernel: Kernel,
    inputs: Sequence[Tensor],
    tile_elements: int | None = None,
    *,
    key: int = 0,
    positions: Sequence[int] | None = None,
) -> Run:
    """Run a kernel over tiles of about `tile_elements` elements, or over one tile if None."""
    shape = inputs[0].shape
    flat = [x.reshape(-1) for x in inputs]
    size = flat[0].numel()
    dtype = torch.float64 if any(x.dtype is torch.float64 for x in inputs) else torch.float32
    step = size if tile_elements is None else max(1, tile_elements // kernel.alignment) * kernel.alignment
    declared = kernel.workspace(min(step, size), dtype.itemsize)
    workspace = Workspace(torch.empty(declared, dtype=torch.uint8, device=inputs[0].device), dtype)

    def tiles() -> Any:
        for start in range(0, size, max(1, step)):
            workspace.reset()
            parts = [x[start : start + step] for x in flat]
            if kernel.unit is not Unit.ELEMENT:
                parts = [x.view(-1, kernel.inputs.columns) for x in parts]
            yield Tile(parts, workspace, element=start, key=key, positions=positions or range(len(flat)))

    def reduce(index: int, state: Any) -> Any:
        merged = None
        for tile in tiles():  # each tile as a chunk of its own
            run = Pass(kernel, index, state, workspace)
            run.reduce(tile)
            merged = kernel.merge(index, merged, run.result())
        return merged

    passes, state = reduced(kernel, reduce)
    output = torch.empty(size, dtype=dtype, device=inputs[0].device)
    final = Pass(kernel, None, state, workspace)
    for tile in tiles():
        result = final.combine(tile)
        assert result.shape == tile.shape
        assert result.dtype == dtype
        output[tile.element : tile.element + tile.elements] = result.reshape(-1)
    return Run(output.view(shape), passes, declared, workspace.peak)


def reduced(kernel: Kernel, reduce: Callable[[int, Any], Any]) -> tuple[int, Any]:
    """Run the passes before the last one; returns the number of all passes, and the state.

    Args:
        kernel: the kernel.
        reduce: computes the partial results of all elements in a pass.
    """
    state, passes = None, 1
    for index in range(kernel.reductions):
        if kernel.needed(index, state):
            passes += 1
            state = kernel.finish(index, reduce(index, state), state)
    return passes, state


def run_fused(
    kernel: Kernel,
    inputs: Sequence[Tensor],
    chunk_elements: int | None = None,
    *,
    out: torch.dtype | None = None,
    key: int = 0,
    positions: Sequence[int] | None = None,
) -> FusedRun:
    """Run a kernel's compiled loops over chunks of about `chunk_elements` elements, or over one chunk if None.

    Args:
        kernel: the kernel.
        inputs: its inputs.
        chunk_elements: number of elements of a chunk, which is rounded to the kernel's alignment.
        out: dtype of the output; the work dtype if None.
        key: random key of the output tensor.
        positions: position in the recipe of each input's model.
    """
    work = torch.float64 if any(x.dtype is torch.float64 for x in inputs) else torch.float32
    out = out or work
    compiled = Compiled(kernel, [NAMES[x.dtype] for x in inputs], NAMES[out])
    data = [(memoryview(x.contiguous().view(-1).view(torch.uint8).numpy()), x.element_size()) for x in inputs]
    size = inputs[0].numel()
    step = size if chunk_elements is None else max(1, chunk_elements // kernel.alignment) * kernel.alignment
    scratch = torch.empty(compiled.scratch + 64, dtype=torch.uint8)
    scratch = scratch[-scratch.data_ptr() % 64 :][: compiled.scratch]

    def chunks() -> Iterator[Chunk]:
        for start in range(0, size, max(1, step)):
            count = min(step, size - start)
            parts = [all_bytes[start * width : (start + count) * width] for all_bytes, width in data]
            yield Chunk(parts, start, count, key, positions or range(len(inputs)))

    def reduce(index: int, state: Any) -> Any:
        merged = None
        for chunk in chunks():
            partial = FusedPass(compiled, index, state, scratch.numpy()).reduce(chunk)
            merged = kernel.merge(index, merged, partial)
        return merged

    passes, state = reduced(kernel, reduce)
    output = torch.full((size,), 77, dtype=torch.uint8).repeat_interleave(out.itemsize)
    beyond = False
    for chunk in chunks():
        part = output[chunk.element * out.itemsize : (chunk.element + chunk.elements) * out.itemsize].numpy()
        beyond |= FusedPass(compiled, None, state, scratch.numpy()).combine(chunk, memoryview(part))
    return FusedRun(output.numpy().tobytes(), passes, beyond)


def merge(
    method: str,
    inputs: Sequence[Tensor],
    parameters: Mapping[str, Any] | None = None,
    *,
    base: int | None = None,
    tile_elements: int | None = None,
    key: int = 0,
    positions: Sequence[int] | None = None,
) -> Tensor:
    """Merge one tensor with the named method."""
    bound = InputSpec(len(inputs), base, tuple(inputs[0].shape))
    kernel = merge_methods()[method].kernel(bound, parameters or {})
    return run_kernel(kernel, inputs, tile_elements, key=key, positions=positions).output
