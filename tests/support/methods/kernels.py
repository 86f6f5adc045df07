"""Makes merge kernels from functions, and runs kernels over tiles of any size without the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergeloom.methods import Array, Inputs, merge_methods
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

    state: Any = None
    passes = 1
    for index in range(kernel.reductions):
        if not kernel.needed(index, state):
            continue
        passes += 1
        merged = None
        for tile in tiles():  # each tile as a chunk of its own
            run = Pass(kernel, index, state, workspace)
            run.reduce(tile)
            merged = kernel.merge(index, merged, run.result())
        state = kernel.finish(index, merged, state)
    output = torch.empty(size, dtype=dtype, device=inputs[0].device)
    final = Pass(kernel, None, state, workspace)
    for tile in tiles():
        result = final.combine(tile)
        assert result.shape == tile.shape
        assert result.dtype == dtype
        output[tile.element : tile.element + tile.elements] = result.reshape(-1)
    return Run(output.view(shape), passes, declared, workspace.peak)


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
