"""Computes chunks with torch, on a device with its own memory: runs a kernel over tiles, rounds, checks the output."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....io.tensors.dtypes import DType
from ....methods.kernel.kernel import Kernel
from ....methods.kernel.torch_backend.passes import Pass
from ....methods.kernel.torch_backend.rounding import canonical_nans, round_into
from ....methods.kernel.torch_backend.tile import Tile, Workspace, tiles
from ...graph.graph import MergeGraph
from ...schedule.schedule import Schedule
from ...schedule.tiling import tile_length
from ..devices.base import Device
from ..tasks import ChunkTask
from .backend import Failed, Outcome, staged_ranges, task_inputs

_EXPONENT_BITS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk of a node's sources, ready to compute on.

    Args:
        kernel: kernel of the node.
        inputs: what is staged of each source: one-dimensional, in its stored dtype.
        element: index of the chunk's first element in the tensor.
        key: random key of the node.
        positions: position in the recipe of each source's model.
        tile: number of elements in a tile.
        elements: number of elements of the chunk.
        staged: range that each source is staged for, see `tiles`; empty if that is the chunk.
        computed: numbers of the sources that other nodes computed: they are not checked.
    """

    kernel: Kernel
    inputs: Sequence[Tensor]
    element: int
    key: int
    positions: Sequence[int]
    tile: int
    elements: int
    staged: Sequence[tuple[int, int]] = ()
    computed: Collection[int] = ()

    def tiles(self, workspace: Workspace) -> Iterator[tuple[slice, Tile]]:
        """Yield the tiles of the chunk in order; the workspace is empty at the start of each."""
        return tiles(
            self.kernel,
            self.inputs,
            workspace,
            self.tile,
            element=self.element,
            elements=self.elements,
            key=self.key,
            positions=self.positions,
            staged=self.staged,
        )


class TorchComputer:
    """The backend of a device with its own memory.

    Args:
        graph: graph to execute.
        schedule: schedule of the graph.
        device: device.
        tile_elements: preferred number of elements in a tile.
    """

    def __init__(self, graph: MergeGraph, schedule: Schedule, device: Device, tile_elements: int) -> None:
        self._graph = graph
        self._schedule = schedule
        self._device = device
        self._tile_elements = tile_elements
        self._workspaces: dict[int, Workspace] = {}

    def open(self, arena: memoryview, failed: Failed) -> None:
        """Do nothing: the device's slots hold the chunks."""

    def begin(self, thread: int, task: ChunkTask) -> None:
        """Make the thread's work on the device wait for the task's uploads."""
        self._device.begin(thread, task.marker)

    def check_inputs(self, thread: int, task: ChunkTask) -> tuple[int, ...]:
        """Return the numbers of the sources that hold a NaN or an infinity in the chunk."""
        return check_inputs(self._piece(task), self._workspace(thread))

    def reduce(self, thread: int, task: ChunkTask, state: Any) -> Any:
        """Return the partial result of the task's pass for the chunk."""
        return reduce_chunk(self._piece(task), task.index, state, self._workspace(thread))

    def combine(self, thread: int, task: ChunkTask, state: Any) -> Outcome:
        """Compute the chunk of the output into the task's slot on the device."""
        dtypes = map(torch_dtype, self._graph.result_dtypes(task.node))
        outs = [
            self._device.slot(output.on_device, output.nbytes).view(dtype)
            for output, dtype in zip(task.outputs, dtypes, strict=True)
        ]
        return combine_chunk(self._piece(task), state, self._workspace(thread), outs)

    def close(self) -> None:
        """Drop the workspaces."""
        self._workspaces.clear()

    def _piece(self, task: ChunkTask) -> Piece:
        graph, kernel = self._graph, task.operation.kernel
        assert kernel is not None
        sources = graph.node_sources[task.node]
        inputs = [
            self._device.slot(cached.slot, cached.nbytes).view(torch_dtype(graph.value_dtype(value)))
            for value, cached in zip(sources, task_inputs(graph, task), strict=True)
        ]
        element, elements = self._schedule.span(graph, task.node, task.chunk)
        return Piece(
            kernel=kernel,
            inputs=inputs,
            element=element,
            elements=elements,
            key=graph.node_key[task.node],
            positions=task.operation.positions,
            tile=tile_length(graph, task.node, self._tile_elements),
            staged=staged_ranges(graph, self._schedule, task),
            computed=[number for number, value in enumerate(sources) if value < 0],
        )

    def _workspace(self, thread: int) -> Workspace:
        workspace = self._workspaces.get(thread)
        if workspace is None:
            workspace = self._workspaces[thread] = Workspace(self._device.workspace(thread), torch.float32)
        return workspace


def work_dtype(inputs: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of the arithmetic: float64 if an input is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in inputs) else torch.float32


def reduce_chunk(piece: Piece, index: int, state: Any, workspace: Workspace) -> Any:
    """Return the partial result of reduction `index` for the chunk."""
    workspace.dtype = work_dtype(piece.inputs)
    run = Pass(piece.kernel, index, state, workspace)
    for _, tile in piece.tiles(workspace):
        run.reduce(tile)
    return run.result()


def combine_chunk(piece: Piece, state: Any, workspace: Workspace, outs: Sequence[Tensor]) -> Outcome:
    """Compute the chunk of each output into a tensor of `outs`, one-dimensional and of the output's dtype."""
    workspace.dtype = work_dtype(piece.inputs)
    extremes: list[list[Tensor]] = [[] for _ in outs]
    run = Pass(piece.kernel, None, state, workspace)
    for _, tile in piece.tiles(workspace):
        for number, (out, found, result) in enumerate(zip(outs, extremes, run.combine_all(tile), strict=True)):
            begin, _ = piece.kernel.written(number, piece.element, piece.elements)
            first, count = piece.kernel.written(number, tile.element, tile.elements)
            found.append(round_into(out[first - begin : first - begin + count], result.view(-1)))
    suspicious = [out for out, found in zip(outs, extremes, strict=True) if _beyond(found, largest(out.dtype))]
    sums = run.byproducts()
    if not suspicious:
        return Outcome(byproducts=sums)
    for out in suspicious:
        canonical_nans(out)
    nonfinite = find_nonfinite(piece)
    overflowed = 0 if nonfinite else sum(count_nonfinite(out, piece.tile) for out in suspicious)
    return Outcome(nonfinite, overflowed, sums)


def check_inputs(piece: Piece, workspace: Workspace) -> tuple[int, ...]:
    """Return the sources that hold a NaN or an infinity in the chunk; quick if there are none."""
    exponents: dict[int, list[Tensor]] = {}
    extremes: dict[torch.dtype, list[Tensor]] = {}
    spec = piece.kernel.inputs
    for part, tile in piece.tiles(workspace):
        for number, tensor in enumerate(tile.inputs):
            if part.start and not spec.access(number).aligned:
                continue  # every tile has all that is staged
            workspace.reset()
            mask = _EXPONENT_BITS.get(tensor.dtype)
            if mask is not None:
                bits = workspace.take(tensor.numel(), torch.int16).view(tensor.shape)
                torch.bitwise_and(tensor.view(torch.int16), mask, out=bits)
                exponents.setdefault(mask, []).append(bits.amax())
            else:
                floats = tensor if tensor.dtype.itemsize >= 4 else tensor.to(torch.float32)
                extremes.setdefault(floats.dtype, []).extend((floats.amax(), floats.amin()))
    suspicious = any(bool((torch.stack(found) == mask).any()) for mask, found in exponents.items())
    suspicious |= any(_beyond(found, largest(dtype)) for dtype, found in extremes.items())
    return find_nonfinite(piece) if suspicious else ()


def find_nonfinite(piece: Piece) -> tuple[int, ...]:
    """Return the numbers of the inputs from files that hold a NaN or an infinity."""
    stored = [number for number in range(len(piece.inputs)) if number not in piece.computed]
    return tuple(number for number in stored if count_nonfinite(piece.inputs[number], piece.tile))


def count_nonfinite(values: Tensor, tile: int) -> int:
    """Return the number of NaN and infinite values, checking `tile` elements at a time."""
    parts = torch.split(values.view(-1), tile)
    return sum(
        part.numel() - int(torch.count_nonzero(torch.isfinite(part if part.dtype.itemsize > 1 else part.float())))
        for part in parts
    )


def _beyond(extremes: Sequence[Tensor], limit: float) -> bool:
    """Return whether any value is a NaN or outside +-limit.

    Args:
        extremes: smallest and largest values of the parts, as tensors of one shape: one wait for the device is enough.
        limit: largest value allowed.
    """
    return not bool((torch.stack(list(extremes)).abs_() <= limit).all())


def largest(dtype: torch.dtype) -> float:
    """Return the largest finite value of a floating-point dtype."""
    return float(torch.finfo(dtype).max)


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's dtype for an element type of the safetensors format."""
    if dtype.torch_name is None:
        raise TypeError(f"torch has no type for {dtype.name}")
    result: torch.dtype = getattr(torch, dtype.torch_name)
    return result
