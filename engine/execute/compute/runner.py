"""Runs kernels on chunks: the passes that reduce a chunk, and the last pass, which makes the output.

This module knows the rules for NaNs and infinities, and chooses the backend of each device: torch for a device with its
own memory, compiled loops for the CPU. The executor decides which chunk is computed when, and in which slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ....errors import CheckpointError
from ...graph.graph import MergeGraph
from ...schedule.schedule import Schedule
from ..devices.base import Device
from ..tasks import ChunkTask
from .backend import Computer, Failed, Outcome


class DamagedInput(CheckpointError):
    """A tensor of a model has values that can't be merged.

    Args:
        model: number of the model in the graph.
        message: description of the tensor, and what to do.
    """

    def __init__(self, model: int, message: str) -> None:
        super().__init__(message)
        self.model = model


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
        self._computers: list[Computer] = []

    def open(self, arena: memoryview, failed: Failed) -> None:
        """Load the backends, and start to compile.

        Args:
            arena: arena in RAM.
            failed: function that ends the run with an error.
        """
        for number in range(len(self._devices)):
            computer = self._computer(number)
            self._computers.append(computer)
            computer.open(arena, failed)

    def close(self) -> None:
        """Drop the references to the arena and the workspaces, which can then be freed."""
        for computer in self._computers:
            computer.close()
        self._computers.clear()

    def reduce(self, thread: int, task: ChunkTask, state: Any) -> Any:
        """Return the partial result of a pass over one chunk; None if the pass is not needed."""
        computer, kernel = self._begin(thread, task), task.operation.kernel
        assert kernel is not None
        return computer.reduce(thread, task, state) if kernel.needed(task.index, state) else None

    def combine(self, thread: int, task: ChunkTask, state: Any) -> Outcome:
        """Compute a chunk of the output into the task's slot; return what was found."""
        outcome = self._begin(thread, task).combine(thread, task, state)
        if not self._allow_nonfinite:
            self._refuse_nonfinite(task, outcome.nonfinite_inputs)
        return outcome

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

    def _computer(self, number: int) -> Computer:
        """Return the backend of a device."""
        device = self._devices[number]
        if device.separate:
            from .torch_computer import TorchComputer

            return TorchComputer(self._graph, self._schedule, device, self._schedule.tile_elements[number])
        from .fused_computer import FusedComputer

        return FusedComputer(self._graph, self._schedule, device, number)

    def _begin(self, thread: int, task: ChunkTask) -> Computer:
        """Return the backend of a task, with the task's inputs checked for NaNs if required."""
        computer, kernel = self._computers[task.device], task.operation.kernel
        assert kernel is not None
        computer.begin(thread, task)
        if task.index == 0 and not kernel.propagates_nonfinite and not self._allow_nonfinite:
            self._refuse_nonfinite(task, computer.check_inputs(thread, task))
        return computer

    def _refuse_nonfinite(self, task: ChunkTask, inputs: Sequence[int]) -> None:
        """Raise an error if an input from a file is not finite; an intermediate tensor may have overflowed."""
        values = [self._graph.node_sources[task.node][number] for number in inputs]
        reads = [value for value in values if value >= 0]
        if reads:
            read = reads[0]
            raise DamagedInput(
                self._graph.read_models[read],
                f"tensor {self._graph.read_names[read]} of {self._model(read)} holds NaN or infinite values (in "
                f"{self._graph.reads[read].file.name}): the model is damaged, or overflowed in training; to merge it "
                "anyway, put `allow_nonfinite: true` in the recipe",
            )

    def _model(self, read: int) -> str:
        return self._graph.models[self._graph.read_models[read]]
