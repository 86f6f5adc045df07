"""Measures the memory of a kernel's passes in torch on small tiles of synthetic values, and extrapolates it.

A kernel's declaration is not enough: a torch operation that converts its input, or a numpy function, allocates memory
that no declaration mentions. The planner therefore runs every kind of kernel of a graph on two small tiles, counts each
allocation of torch, numpy and Python, and extrapolates to the tiles of the merge.
"""

from __future__ import annotations

import functools
import gc
import itertools
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import MergeloomError, UsageError
from ...io.tensors.dtypes import DType
from ...methods.kernel.kernel import Kernel
from ...methods.kernel.spec import HostError, Unit
from ...methods.kernel.torch_backend.tile import Workspace
from ..execute.compute.torch_computer import (
    Piece,
    check_inputs,
    combine_chunk,
    count_nonfinite,
    find_nonfinite,
    reduce_chunk,
    torch_dtype,
)
from ..graph.footprint import Footprint, Line
from ..graph.graph import Operation
from .kernel_class import kernel_class

SMALL_TILE = 1 << 17
"""Elements of the smaller of the two measured tiles; the other one is twice as large."""
_LEAST_TILE = 1 << 15
_INPUT_BYTES = 8 << 20
"""Maximum size of the inputs of the smaller tile in bytes, unless that leaves less than `_LEAST_TILE`."""
_COLUMNS = 1 << 12
"""Columns of the tiles of kernels that do not work by row."""
_STEP = 64 << 10
"""Allocated bytes are rounded up to a multiple of this: Python's own allocations vary a little."""


_measured: dict[tuple[Any, ...], Footprint] = {}
"""Footprints that were measured in this process."""


def footprint(operation: Operation, dtypes: Sequence[DType], outs: Sequence[DType]) -> Footprint:
    """Return the memory of a thread that computes an operation, measured if it is not known.

    Args:
        operation: operation with a kernel.
        dtypes: dtypes of the kernel's inputs.
        outs: dtype of each output.
    """
    kernel = operation.kernel
    assert kernel is not None
    shapes = small_shapes(kernel, dtypes)
    key = (kernel_class(kernel), shapes, tuple(dtype.name for dtype in dtypes), tuple(out.name for out in outs))
    result = _measured.get(key)
    if result is None:
        result = _measured[key] = _measure(operation, shapes, dtypes, outs)
    return result


def small_shapes(kernel: Kernel, dtypes: Sequence[DType]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes that a kernel is measured on: one or two, no larger than the kernel's own shape."""
    inputs, widths = kernel.inputs, sum(dtype.bits // 8 for dtype in dtypes)
    total = inputs.rows * inputs.columns
    size = SMALL_TILE
    while size > _LEAST_TILE and size * widths > _INPUT_BYTES:
        size //= 2
    if total <= size:
        return (inputs.shape,)
    if len(inputs.shape) == 1:
        return ((size,), (min(total, 2 * size),)) if kernel.unit is Unit.ELEMENT else (inputs.shape,)
    columns = inputs.columns if kernel.unit is not Unit.ELEMENT else min(inputs.columns, _COLUMNS)
    rows = max(1, size // columns)
    return (rows, columns), (min(2 * rows, -(-total // columns)), columns)


def _measure(
    operation: Operation, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[DType], outs: Sequence[DType]
) -> Footprint:
    kernel = operation.kernel
    assert kernel is not None
    points = []
    for shape in shapes:
        try:
            small = kernel if shape == kernel.inputs.shape else kernel.resized(shape)
            points.append(_run(small, operation, dtypes, outs))
        except (MergeloomError, MemoryError):
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, HostError) else f"{type(error).__name__}: {error}"
            raise UsageError(
                f"merge method {operation.method} fails on a test tensor of shape {shape}: {reason}"
            ) from error
    second = points[1] if len(points) > 1 else None
    lines = [Line.through((points[0][0], points[0][part]), second and (second[0], second[part])) for part in (1, 2)]
    return Footprint(*lines)


def _run(kernel: Kernel, operation: Operation, dtypes: Sequence[DType], outs: Sequence[DType]) -> tuple[int, int, int]:
    """Run a kernel's passes over one tile; return its elements, its workspace and its allocations in bytes."""
    elements = kernel.inputs.rows * kernel.inputs.columns
    positions = operation.positions or tuple(range(len(dtypes)))
    counts = [kernel.inputs.staged(index, 0, elements) for index in range(len(dtypes))]
    piece = Piece(kernel, _inputs(dtypes, counts), 0, 0x9E3779B97F4A7C15, positions, elements, elements)
    results = [torch.empty(elements, dtype=torch_dtype(out)) for out in outs]
    peak = 0
    taken = 0

    def measured(work: Callable[[Workspace], Any]) -> Any:
        nonlocal peak, taken
        space = _Counting()
        work(space)
        taken = max(taken, space.peak)
        real = Workspace(torch.empty(space.peak, dtype=torch.uint8), torch.float32)
        with _one_thread(), allocations() as allocated:
            value = work(real)
        peak = max(peak, allocated.peak if allocated.complete else allocated.peak + space.peak)
        return value

    with _one_thread():
        if not kernel.propagates_nonfinite:
            measured(lambda space: check_inputs(piece, space))
        state: Any = None
        for index in range(kernel.reductions):
            if kernel.needed(index, state):
                partial = measured(functools.partial(reduce_chunk, piece, index, state))
                state = kernel.finish(index, partial, state)
        measured(lambda space: combine_chunk(piece, state, space, results))
        measured(lambda space: (find_nonfinite(piece), [count_nonfinite(result, elements) for result in results]))
    return elements, taken, -(-peak // _STEP) * _STEP


def _inputs(dtypes: Sequence[DType], counts: Sequence[int]) -> list[Tensor]:
    """Return synthetic inputs: one random tensor, and small random changes like those of fine-tuning.

    Args:
        dtypes: dtype of each input.
        counts: number of elements of each input.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(max(counts), generator=generator).sub_(0.5).mul_(0.1)
    inputs = []
    for i, (dtype, count) in enumerate(zip(dtypes, counts, strict=True)):
        values = torch.rand(count, generator=generator).sub_(0.5).mul_(0.01 * (i > 0)).add_(start[:count])
        inputs.append((values.abs_() if dtype.name == "F8_E8M0" else values).to(torch_dtype(dtype)))  # has no sign
    return inputs


class _Counting(Workspace):
    """A workspace without a limit that counts the bytes taken.

    Buffers at one offset share memory, as in a real workspace: kernels alias a buffer by releasing and taking it again.
    """

    def __init__(self) -> None:
        super().__init__(torch.empty(0, dtype=torch.uint8), torch.float32)
        self._memory_at: dict[int, Tensor] = {}

    def take(self, elements: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a buffer at the top of the stack."""
        dtype = dtype or self.dtype
        nbytes = elements * dtype.itemsize
        memory = self._memory_at.get(self._used)
        if memory is None or memory.numel() < nbytes:
            memory = self._memory_at[self._used] = torch.empty(nbytes, dtype=torch.uint8)
        self._used += -(-nbytes // 64) * 64
        self.peak = max(self.peak, self._used)
        return memory[:nbytes].view(dtype)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch from starting threads of its own, as a merge does."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(slots=True)
class Allocations:
    """The allocations in a block of code.

    Args:
        peak: highest number of bytes allocated at one time.
        complete: whether torch's allocations are counted, too.
    """

    peak: int = 0
    complete: bool = True


@contextmanager
def allocations() -> Iterator[Allocations]:
    """Count the allocations of this thread in torch's CPU allocator, and of the process in numpy and Python."""
    result = Allocations()
    collects, tracing = gc.isenabled(), tracemalloc.is_tracing()
    gc.disable()
    if not tracing:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    stop = _record_allocations()
    try:
        yield result
    finally:
        changes = stop() if stop is not None else []
        python = tracemalloc.get_traced_memory()[1] - before
        if not tracing:
            tracemalloc.stop()
        if collects:
            gc.enable()
        result.complete = stop is not None
        result.peak = max(0, python) + max(itertools.accumulate(changes), default=0)


def _record_allocations() -> Callable[[], list[int]] | None:
    """Record this thread's allocations in torch, until the returned function is called: it returns the bytes of each,
    below 0 where they were freed. None where this torch cannot, or a program that uses mergeloom profiles already."""
    autograd: Any = torch.autograd
    calls: Any = torch._C._autograd
    try:
        experimental = torch._C._profiler._ExperimentalConfig()
        state = autograd.ProfilerState.CPU
        calls._enable_profiler_legacy(autograd.ProfilerConfig(state, False, True, False, False, False, experimental))
    except (AttributeError, TypeError, RuntimeError):
        return None

    def stop() -> list[int]:
        events = itertools.chain.from_iterable(calls._disable_profiler_legacy())
        return [event.cpu_memory_usage() for event in events if event.kind() == "memory_alloc"]

    return stop
