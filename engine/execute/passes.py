"""What is computed of a chunk: the passes that reduce it, and the last one, which makes the output.

It knows torch and the methods' kernels. Which chunk is computed when, and in which slots it lies, is the executor's.
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
    """Computes the chunks of a schedule. Its methods are called by the devices' compute threads.

    Args:
        graph: what is made.
        schedule: how.
        devices: those of the schedule's budget, in its order.
        allow_nonfinite: whether a NaN or an infinity in an input is let through.
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
        """Look at the arena in RAM as torch does: one-dimensional uint8."""
        torch = import_torch()
        self._host = torch.frombuffer(arena, dtype=torch.uint8)
        return self._host

    def close(self) -> None:
        """Let go of what looks into the arena and the workspaces, so that they can be given back."""
        self._workspaces.clear()
        self._host = None

    def host_bytes(self, slot: int, nbytes: int) -> Tensor:
        """The first bytes of a slot in RAM."""
        assert self._host is not None
        start = slot * self._schedule.slot_bytes
        return self._host[start : start + nbytes]

    def reduce(self, thread: int, item: ChunkTask, state: Any) -> Any:
        """One pass's partial of a chunk, to be merged with those of the others; None where the pass isn't needed."""
        from .compute import reduce_chunk

        piece, workspace = self._begin(thread, item)
        if piece.kernel.needed(item.index, state):
            return reduce_chunk(piece, item.index, state, workspace)
        return None

    def combine(self, thread: int, item: ChunkTask, state: Any) -> int:
        """Put a chunk of the output where the item says; how many of its values are new infinities or NaNs."""
        from .compute import combine_chunk, torch_dtype

        piece, workspace = self._begin(thread, item)
        device = self._devices[item.device]
        if device.separate:
            target = device.slot(item.out_device, item.out_nbytes)
        else:
            target = self.host_bytes(item.out, item.out_nbytes)
        outcome = combine_chunk(piece, state, workspace, target.view(torch_dtype(self._graph.node_dtype[item.node])))
        if not self._allow_nonfinite:
            self._refuse_nonfinite(item, outcome.nonfinite_inputs)
        return outcome.overflowed

    def compare(self, item: ChunkTask, views: Sequence[memoryview], target: memoryview) -> None:
        """Copy integers where all inputs agree. Raises CheckpointError where they don't."""
        graph = self._graph
        reads = list(dict.fromkeys(graph.node_sources[item.node]))
        for read, view in zip(reads[1:], views[1:], strict=True):
            if view != views[0]:
                raise CheckpointError(
                    f"tensor {graph.label(item.node)}: its {graph.reads[read].dtype.name} values differ "
                    f"between {self._model(reads[0])} and {self._model(read)}; integer tensors are only copied, where "
                    "they are equal in all models"
                )
        target[:] = views[0]

    def _begin(self, thread: int, item: ChunkTask) -> tuple[Piece, Any]:
        """The item as a piece of its tensor, its inputs checked if they must be, and the thread's workspace."""
        from .compute import Piece, check_inputs, torch_dtype

        graph, device, kernel = self._graph, self._devices[item.device], item.operation.kernel
        assert kernel is not None
        device.begin(thread, item.marker)
        places = dict(zip(dict.fromkeys(graph.node_sources[item.node]), item.residents, strict=True))
        inputs = []
        for read in graph.node_sources[item.node]:
            resident = places[read]
            raw = (device.slot if device.separate else self.host_bytes)(resident.slot, resident.nbytes)
            inputs.append(raw.view(torch_dtype(graph.reads[read].dtype)))
        piece = Piece(
            kernel=kernel,
            inputs=inputs,
            element=self._schedule.span(graph, item.node, item.chunk)[0],
            key=graph.node_key[item.node],
            positions=item.operation.positions,
            tile=tile_length(graph, item.node, self._schedule.tile_elements[item.device]),
        )
        workspace = self._workspace(thread, item.device)
        if item.index == 0 and not kernel.propagates_nonfinite and not self._allow_nonfinite:
            self._refuse_nonfinite(item, check_inputs(piece, workspace))
        return piece, workspace

    def _workspace(self, thread: int, device: int) -> Any:
        import torch

        from ...methods.kernel.tile import Workspace

        found = self._workspaces.get((thread, device))
        if found is None:
            memory = self._devices[device].workspace(thread)
            found = self._workspaces[(thread, device)] = Workspace(memory, torch.float32)
        return found

    def _refuse_nonfinite(self, item: ChunkTask, inputs: Sequence[int]) -> None:
        if inputs:
            read = self._graph.node_sources[item.node][inputs[0]]
            raise CheckpointError(
                f"tensor {self._graph.read_names[read]} of {self._model(read)} holds NaN or infinite values: the model "
                "is damaged, or overflowed in training; `allow_nonfinite: true` in the recipe merges it all the same"
            )

    def _model(self, read: int) -> str:
        return self._graph.models[self._graph.read_models[read]]


def import_torch() -> ModuleType:
    """torch, imported without collections of garbage: hundreds of them find nothing in all that it defines."""
    collects = gc.isenabled()
    gc.disable()
    try:
        import torch
    finally:
        if collects:
            gc.enable()
    return torch
