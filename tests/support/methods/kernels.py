"""Makes merge kernels from functions, and runs kernels over tiles of any size without the engine."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergeloom.io.tensors.dtypes import DTYPES
from mergeloom.methods import Array, Inputs, merge_methods
from mergeloom.methods.kernel.fused.compiled import Compiled
from mergeloom.methods.kernel.fused.passes import FusedPass
from mergeloom.methods.kernel.fused.run import Chunk
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.method import Method
from mergeloom.methods.kernel.spec import Absent, Base, InputSpec
from mergeloom.methods.kernel.torch_backend.passes import Pass
from mergeloom.methods.kernel.torch_backend.tile import Tile, Workspace, tiles


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
        outputs: each merged tensor in the work dtype.
        passes: number of passes over the tiles.
        declared: declared workspace of the largest tile in bytes.
        used: peak use of the workspace in bytes.
        byproducts: sums of blocks of each by-product, in their order.
    """

    outputs: list[Tensor]
    passes: int
    declared: int
    used: int
    byproducts: list[list[float]]

    @property
    def output(self) -> Tensor:
        """The first merged tensor."""
        return self.outputs[0]


@dataclass
class FusedRun:
    """The result of running a kernel's compiled loops.

    Args:
        outputs: bytes of each merged tensor.
        passes: number of passes over the chunks.
        beyond: whether a value is NaN or beyond the largest number of the dtype.
        byproducts: sums of blocks of each by-product, in their order.
    """

    outputs: list[bytes]
    passes: int
    beyond: bool
    byproducts: list[list[float]]

    @property
    def output(self) -> bytes:
        """The bytes of the first merged tensor."""
        return self.outputs[0]


NAMES = {getattr(torch, dtype.torch_name): name for name, dtype in DTYPES.items() if dtype.torch_name}
"""The names of torch's dtypes in a safetensors header."""


def run_kernel(
    kernel: Kernel,
    inputs: Sequence[Tensor],
    tile_elements: int | None = None,
    *,
    chunk_elements: int | None = None,
    key: int = 0,
    positions: Sequence[int] | None = None,
) -> Run:
    """Run a kernel over tiles of about `tile_elements` elements, or over one tile if None.

    Inputs that are not aligned are staged for chunks of about `chunk_elements` elements, or for one chunk if None.
    """
    shape, size = kernel.inputs.shape, math.prod(kernel.inputs.shape)
    dtype = torch.float64 if any(x.dtype is torch.float64 for x in inputs) else torch.float32
    step, chunk = (
        size if elements is None else max(1, elements // kernel.alignment) * kernel.alignment
        for elements in (tile_elements, chunk_elements)
    )
    declared = kernel.workspace(min(step, size), dtype.itemsize)
    workspace = Workspace(torch.empty(declared, dtype=torch.uint8, device=inputs[0].device), dtype)

    def all_tiles() -> Iterator[Tile]:
        for start in range(0, size, max(1, chunk)):
            count = min(chunk, size - start)
            staged = [staged_elements(kernel.inputs, number, x, start, count) for number, x in enumerate(inputs)]
            places = positions or range(len(inputs))
            cut = tiles(kernel, staged, workspace, step, element=start, elements=count, key=key, positions=places)
            for _, tile in cut:
                yield tile

    def reduce(index: int, state: Any) -> Any:
        merged = None
        for tile in all_tiles():  # the results of each tile are merged as those of a chunk
            run = Pass(kernel, index, state, workspace)
            run.reduce(tile)
            merged = kernel.merge(index, merged, run.result())
        return merged

    passes, state = reduced(kernel, reduce)
    sizes = [kernel.written(number, 0, size)[1] for number in range(len(kernel.outputs))]
    outputs = [torch.empty(each, dtype=dtype, device=inputs[0].device) for each in sizes]
    final = Pass(kernel, None, state, workspace)
    for tile in all_tiles():
        for number, (output, result) in enumerate(zip(outputs, final.combine_all(tile), strict=True)):
            first, count = kernel.written(number, tile.element, tile.elements)
            assert result.shape == (tile.shape if kernel.blocks[number] is None else (count,))
            assert result.dtype == dtype
            output[first : first + count] = result.reshape(-1)
    shaped = [
        output.view(shape) if blocks is None else output for output, blocks in zip(outputs, kernel.blocks, strict=True)
    ]
    return Run(shaped, passes, declared, workspace.peak, final.byproducts())


def staged_elements(spec: InputSpec, number: int, part: Tensor, first: int, count: int) -> Tensor:
    """What is staged of a complete input for a range of the output's elements, one-dimensional."""
    flat = part.contiguous().view(-1)
    spans = spec.access(number).spans(spec.shape, spec.part(number), first, count)
    pieces = [
        torch.zeros(span.length, dtype=torch.uint8).repeat_interleave(flat.itemsize).view(flat.dtype)
        if span.start < 0
        else flat[span.start : span.start + span.length]
        for span in spans
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat([x.view(torch.uint8) for x in pieces]).view(flat.dtype)


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
    out: torch.dtype | Sequence[torch.dtype] | None = None,
    key: int = 0,
    positions: Sequence[int] | None = None,
    threads: int = 1,
    complete: bool = False,
) -> FusedRun:
    """Run a kernel's compiled loops over chunks of about `chunk_elements` elements, or over one chunk if None.

    Args:
        kernel: the kernel.
        inputs: its inputs.
        chunk_elements: number of elements of a chunk, which is rounded to the kernel's alignment.
        out: dtype of the output, or of each output; the work dtype if None.
        key: random key of the output tensor.
        positions: position in the recipe of each input's model.
        threads: number of threads that compute chunks at the same time.
        complete: whether all elements of inputs that are not aligned are staged for each chunk.
    """
    work = torch.float64 if any(x.dtype is torch.float64 for x in inputs) else torch.float32
    outs = [out or work] if out is None or isinstance(out, torch.dtype) else out
    compiled = Compiled(kernel, [NAMES[x.dtype] for x in inputs], *(NAMES[each] for each in outs))
    size = math.prod(kernel.inputs.shape)
    step = size if chunk_elements is None else max(1, chunk_elements // kernel.alignment) * kernel.alignment
    own = threading.local()

    def scratch() -> Any:
        if not hasattr(own, "scratch"):
            memory = torch.empty(compiled.scratch + 64, dtype=torch.uint8)
            own.scratch = memory[-memory.data_ptr() % 64 :][: compiled.scratch].numpy()
        return own.scratch

    def chunks() -> Iterator[Chunk]:
        for start in range(0, size, max(1, step)):
            yield chunk_of(kernel.inputs, inputs, start, min(step, size - start), key, positions, complete)

    def reduce(index: int, state: Any) -> Any:
        merged = None
        for partial in pool.map(lambda chunk: FusedPass(compiled, index, state, scratch()).reduce(chunk), chunks()):
            merged = kernel.merge(index, merged, partial)
        return merged

    def combine(chunk: Chunk) -> tuple[bool, list[list[float]]]:
        ranges = [kernel.written(number, chunk.element, chunk.elements) for number in range(len(outs))]
        found = zip(outputs, widths, ranges, strict=True)
        parts = [memoryview(output[first * w : (first + count) * w].numpy()) for output, w, (first, count) in found]
        last = FusedPass(compiled, None, state, scratch())
        return last.combine(chunk, *parts), last.byproducts

    with ThreadPoolExecutor(threads) as pool:
        passes, state = reduced(kernel, reduce)
        widths = [each.itemsize for each in outs]
        outputs = _buffers(kernel, widths)
        found = list(pool.map(combine, chunks()))
    sums = [[each for _, partial in found for each in partial[number]] for number in range(len(kernel.byproducts))]
    return FusedRun([x.numpy().tobytes() for x in outputs], passes, any(beyond for beyond, _ in found), sums)


def _buffers(kernel: Kernel, widths: Sequence[int]) -> list[Tensor]:
    """A buffer for each output, of elements of these widths in bytes, which are not 0 before they are computed."""
    size = math.prod(kernel.inputs.shape)
    sizes = [kernel.written(number, 0, size)[1] * width for number, width in enumerate(widths)]
    return [torch.full((each,), 77, dtype=torch.uint8) for each in sizes]


def chunk_of(
    spec: InputSpec,
    inputs: Sequence[Tensor],
    start: int,
    count: int,
    key: int,
    positions: Sequence[int] | None,
    complete: bool,
) -> Chunk:
    """A chunk of the output, and what is staged of its inputs; see `run_fused`."""
    complete_range = (0, math.prod(spec.shape))
    ranges = [
        complete_range if complete and not spec.access(number).aligned else (start, count)
        for number in range(len(inputs))
    ]
    staged = [staged_elements(spec, number, x, *ranges[number]) for number, x in enumerate(inputs)]
    parts = [memoryview(x.view(torch.uint8).numpy()) for x in staged]
    return Chunk(parts, start, count, key, positions or range(len(inputs)), ranges if complete else ())


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
