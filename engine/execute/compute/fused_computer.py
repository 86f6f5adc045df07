"""Computes chunks on the CPU with compiled loops, which read and write the slots of the arena in place.

The loops are compiled in the order of the plan by a thread of their own, while the first bytes are being read.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from ....methods.kernel.fused.compiled import Compiled
from ....methods.kernel.fused.finite import count_nonfinite, finite
from ....methods.kernel.fused.finite import prepare as prepare_finite
from ....methods.kernel.fused.passes import FusedPass
from ....methods.kernel.fused.run import Chunk
from ...graph.graph import MergeGraph
from ...schedule.schedule import Schedule
from ..devices.base import Device
from ..lanes import Lane
from ..tasks import ChunkTask
from .backend import Failed, Outcome, staged_ranges, task_inputs


class FusedComputer:
    """The backend of the CPU.

    Args:
        graph: graph to execute.
        schedule: schedule of the graph.
        device: the CPU.
        number: number of the device in the schedule.
    """

    def __init__(self, graph: MergeGraph, schedule: Schedule, device: Device, number: int) -> None:
        self._graph = graph
        self._schedule = schedule
        self._device = device
        self._loops = _LoopsInPlanOrder(graph, schedule, number)
        self._arena = memoryview(b"")
        self._current: list[tuple[int, int, FusedPass] | None] = [None] * device.threads

    def open(self, arena: memoryview, failed: Failed) -> None:
        """Start to compile."""
        self._arena = arena[:]
        self._loops.start(failed)

    def begin(self, thread: int, task: ChunkTask) -> None:
        """Do nothing: the chunks are in RAM."""

    def check_inputs(self, thread: int, task: ChunkTask) -> tuple[int, ...]:
        """Return the numbers of the sources that hold a NaN or an infinity in the chunk."""
        return self._nonfinite(self._chunk(task), task)

    def reduce(self, thread: int, task: ChunkTask, state: Any) -> Any:
        """Return the partial result of the task's pass for the chunk."""
        return self._pass(thread, task, state).reduce(self._chunk(task))

    def combine(self, thread: int, task: ChunkTask, state: Any) -> Outcome:
        """Compute the chunk of each output into its slot."""
        chunk = self._chunk(task)
        outs = [self._view(output.slot, output.nbytes) for output in task.outputs]
        computing = self._pass(thread, task, state)
        beyond = computing.combine(chunk, *outs)
        sums = computing.byproducts
        if not beyond:
            return Outcome(byproducts=sums)
        nonfinite = self._nonfinite(chunk, task)
        if nonfinite:
            return Outcome(nonfinite, byproducts=sums)
        dtypes = self._graph.result_dtypes(task.node)
        count = sum(count_nonfinite(out, dtype.name) for out, dtype in zip(outs, dtypes, strict=True))
        return Outcome((), count, sums)

    def close(self) -> None:
        """End the compilation, and release the arena."""
        self._loops.stop()
        self._current = [None] * len(self._current)
        self._arena = memoryview(b"")

    def _pass(self, thread: int, task: ChunkTask, state: Any) -> FusedPass:
        """Return the pass of a task, which a thread keeps for the next chunk of the tensor."""
        current = self._current[thread]
        if current is not None and current[:2] == (task.node, task.index):
            return current[2]
        compiled = self._loops.compiled(task.node)
        scratch = self._device.workspace(thread)
        if len(scratch) < compiled.scratch:
            raise MemoryError(
                f"a kernel needs more scratch memory than was planned: {compiled.scratch} of {len(scratch)} bytes"
            )
        made = FusedPass(compiled, None if task.last else task.index, state, scratch)
        self._current[thread] = task.node, task.index, made
        return made

    def _chunk(self, task: ChunkTask) -> Chunk:
        element, elements = self._schedule.span(self._graph, task.node, task.chunk)
        inputs = [self._view(cached.slot, cached.nbytes) for cached in task_inputs(self._graph, task)]
        staged = staged_ranges(self._graph, self._schedule, task)
        return Chunk(inputs, element, elements, self._graph.node_key[task.node], task.operation.positions, staged)

    def _view(self, slot: int, nbytes: int) -> memoryview:
        start = slot * self._schedule.slot_bytes
        return self._arena[start : start + nbytes]

    def _nonfinite(self, chunk: Chunk, task: ChunkTask) -> tuple[int, ...]:
        """Return the numbers of the inputs from files that hold a NaN or an infinity."""
        sources = self._graph.node_sources[task.node]
        return tuple(
            number
            for number, (data, value) in enumerate(zip(chunk.inputs, sources, strict=True))
            if value >= 0 and not finite(data, self._graph.value_dtype(value).name)
        )


@dataclass(slots=True)
class _Loops:
    """The loops of one kernel.

    Args:
        compiled: loops, which can be used once `ready` is set.
        ready: whether they are compiled.
        lock: lock of the thread that compiles them.
    """

    compiled: Compiled
    ready: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class _LoopsInPlanOrder:
    """Compiles the loops of a schedule's kernels ahead of the compute threads.

    A compute thread that needs loops whose turn has not come compiles them itself. LLVM compiles one kernel at a time,
    so the thread waits for at most one other.

    Args:
        graph: graph to execute.
        schedule: schedule of the graph.
        device: number of the device in the schedule.
    """

    def __init__(self, graph: MergeGraph, schedule: Schedule, device: int) -> None:
        self._graph = graph
        self._schedule = schedule
        self._device = device
        self._known: dict[tuple[object, ...], _Loops] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self._lane: Lane[int] | None = None

    def start(self, failed: Failed) -> None:
        """Start the thread, which reports an error to `failed`."""
        self._lane = Lane("compile", 1, self._compile_all, failed)
        self._lane.put(0, self._device)

    def stop(self) -> None:
        """End the thread after the kernel that it is compiling."""
        self._stopped = True
        if self._lane is not None:
            self._lane.stop()
            self._lane.join()

    def compiled(self, node: int) -> Compiled:
        """Return the compiled loops of a node's kernel; compile them, or wait for them, if they are not ready."""
        graph, kernel = self._graph, self._graph.operation(node).kernel
        assert kernel is not None
        dtypes = tuple(graph.value_dtype(value).name for value in graph.node_sources[node])
        outs = tuple([dtype.name for dtype in graph.result_dtypes(node)])
        with self._lock:
            loops = self._known.get((id(kernel), dtypes, outs))
            if loops is None:
                loops = self._known[id(kernel), dtypes, outs] = _Loops(Compiled(kernel, dtypes, *outs))
        if not loops.ready:
            with loops.lock:
                if not loops.ready:
                    if not kernel.propagates_nonfinite:
                        for dtype in dict.fromkeys(dtypes):
                            prepare_finite(dtype)
                    loops.compiled.prepare()
                    loops.ready = True
        return loops.compiled

    def _compile_all(self, thread: int, device: int) -> None:
        graph = self._graph
        seen: set[tuple[int, str]] = set()  # nodes with the same operation seldom differ in the dtypes of their sources
        for step in self._schedule.steps:
            if self._stopped:
                return
            key = (graph.node_operation[step.node], graph.node_dtype[step.node].name)
            if step.device != device or key in seen or not graph.elements(step.node):
                continue
            seen.add(key)
            if graph.operation(step.node).kernel is not None:
                self.compiled(step.node)
