"""Runs kernels on chunks: the passes that reduce a chunk, and the last pass, which makes the output.

This module knows torch and the methods' kernels. The executor decides which chunk is computed when, and in which slots.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ..graph.graph import MergeGraph
from ..schedule.schedule import Schedule
from ..schedule.tiling import tile_length
from .devices.base import Device
from .tasks import ChunkTask

if TYPE_CHECKING:
    from torch import Tensor

    from .compute import Piece


class KernelRunner:
    """Computes the chunks of a schedule. The compute threads of all devices call its methods.

    Args:
        graph: graph to execute.
        schedule: schedule of the graph.
        devices: devices of the schedule's budget, in its order.
        allow_nonfinite: whether a NaN or an infinity is accepted in an input of a computed tensor.
    """

    def __init__(
        self, graph: MergeGraph, schedule: Schedule, devices: Sequence[Device], *, allow_nonfinite: bool
    ) -> None:
        self._graph = graph
        self._schedule = schedule
        self._devices = devices
        self._allow_nonfinite = allow_nonfinite
        self._host: Tensor | None = None
        self._workspaces: dict[tuple[int, int], Any] = {}

    def open(self, arena: memoryview) -> Tensor:
        """Return the arena in RAM as a torch tensor: one-dimensional uint8."""
        torch = import_torch()
        self._host = torch.frombuffer(arena, dtype=torch.uint8)
        return self._host

    def close(self) -> None:
        """Drop the tensors that refer to the arena and the workspaces, which can then be freed."""
        self._workspaces.clear()
        self._host = None

    def host_bytes(self, slot: int, nbytes: int) -> Tensor:
        """Return the first `nbytes` bytes of a slot in RAM."""
        assert self._host is not None
        start = slot * self._schedule.slot_bytes
        return self._host[start : start + nbytes]

    def reduce(self, thread: int, task: ChunkTask, state: Any) -> Any:
        """Return the partial result of a pass over one chunk; None if the pass is not needed."""
        from .compute import reduce_chunk

        piece, workspace = self._begin(thread, task)
        if piece.kernel.needed(task.index, state):
            return reduce_chunk(piece, task.index, state, workspace)
        return None

    def combine(self, thread: int, task: ChunkTask, state: Any) -> int:
        """Compute a chunk of the output into the task's slot; return its number of new infinities and NaNs."""
        from .compute import combine_chunk, torch_dtype

        piece, workspace = self._begin(thread, task)
        device = self._devices[task.device]
        if device.separate:
            target = device.slot(task.out_device, task.out_nbytes)
        else:
            target = self.host_bytes(task.out, task.out_nbytes)
        outcome = combine_chunk(piece, state, workspace, target.view(torch_dtype(self._graph.node_dtype[task.node])))
        if not self._allow_nonfinite:
            self._refuse_nonfinite(task, outcome.nonfinite_inputs)
        return outcome.overflowed

    def compare(self, task: ChunkTask, views: Sequence[memoryview], target: memoryview) -> None:
        """Copy a chunk of integers that must be equal in all inputs.

        Args:
            task: task of the chunk.
            views: chunk of each distinct source.
            target: chunk of the output.

        Raises:
            CheckpointError: if they differ.
        """
        graph = self._graph
        reads = list(dict.fromkeys(graph.node_sources[task.node]))
        for read, view in zip(reads[1:], views[1:], strict=True):
            if view != views[0]:
                raise CheckpointError(
                    f"tensor {graph.label(task.node)}: its {graph.reads[read].dtype.name} values differ "
                    f"between {self._model(reads[0])} and {self._model(read)}; integer tensors must be equal in all "
                    "models, because they are copied and not merged"
                )
        target[:] = views[0]

    def _begin(self, thread: int, task: ChunkTask) -> tuple[Piece, Any]:
        """Return the inputs of a task, checked for NaNs if required, and the thread's workspace."""
        from .compute import Piece, check_inputs, torch_dtype

        graph, device, kernel = self._graph, self._devices[task.device], task.operation.kernel
        assert kernel is not None
        device.begin(thread, task.marker)
        chunks = dict(zip(dict.fromkeys(graph.node_sources[task.node]), task.inputs, strict=True))
        inputs = []
        for read in graph.node_sources[task.node]:
            cached = chunks[read]
            raw = (device.slot if device.separate else self.host_bytes)(cached.slot, cached.nbytes)
            inputs.append(raw.view(torch_dtype(graph.reads[read].dtype)))
        piece = Piece(
            kernel=kernel,
            inputs=inputs,
            element=self._schedule.span(graph, task.node, task.chunk)[0],
            key=graph.node_key[task.node],
            positions=task.operation.positions,
            tile=tile_length(graph, task.node, self._schedule.tile_elements[task.device]),
        )
        workspace = self._workspace(thread, task.device)
        if task.index == 0 and not kernel.propagates_nonfinite and not self._allow_nonfinite:
            self._refuse_nonfinite(task, check_inputs(piece, workspace))
        return piece, workspace

    def _workspace(self, thread: int, device: int) -> Any:
        import torch

        from ...methods.kernel.torch_backend.tile import Workspace

        workspace = self._workspaces.get((thread, device))
        if workspace is None:
            memory = self._devices[device].workspace(thread)
            workspace = self._workspaces[(thread, device)] = Workspace(memory, torch.float32)
        return workspace

    def _refuse_nonfinite(self, task: ChunkTask, inputs: Sequence[int]) -> None:
        if inputs:
            read = self._graph.node_sources[task.node][inputs[0]]
            raise CheckpointError(
                f"tensor {self._graph.read_names[read]} of {self._model(read)} holds NaN or infinite values: the model "
                "is damaged, or overflowed in training; to merge it anyway, put `allow_nonfinite: true` in the recipe"
            )

    def _model(self, read: int) -> str:
        return self._graph.models[self._graph.read_models[read]]


def import_torch() -> ModuleType:
    """Import torch with garbage collection off: hundreds of collections would find nothing to free."""
    collects = gc.isenabled()
    gc.disable()
    try:
        import torch
    finally:
        if collects:
            gc.enable()
    return torch
