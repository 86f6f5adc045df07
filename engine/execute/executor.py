"""Executes a schedule: read, upload, compute, download and write lanes run concurrently.

The main thread dispatches: it goes through the schedule's steps chunk by chunk and takes the slots of each chunk, in
the order of the plan. It waits while too few are free. A chunk that has its slots depends on no later chunk, so the
wait always ends, and no more is held than the schedule allows.

From then on, the chunk's task goes from state to state (`TaskState`). A lane does the work of a state; then `TaskFlow`
moves the task to the next state and hands it to the lane of that state.

Locks, in the order in which a thread may take them; it holds at most one of each:

1. ``Executor._changed`` guards the slots, the tasks and the nodes in progress.
2. The lock of a lane guards its queue. A task is queued under lock 1, so the chunks of a tensor reach the write lane in
   order. The lane's own threads take it alone.

Neither is held while a lane works, nor while the source, the sink, a device, a kernel or `notify` is called. The
reducers of nodes, the counters and the outcome have locks of their own, which are taken alone. None of the locks is
re-entrant.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from ...errors import UsageError
from ...io.counters import IoCounters
from ...io.task_group import TaskGroup
from ...io.tensors.assembled import read_tensor
from ...methods.kernel.spec import HostError
from ..graph.extents import made
from ..graph.graph import Kind, MergeGraph
from ..schedule.schedule import Schedule
from ..schedule.step_list import Step
from .arena import HostArena
from .compute.runner import KernelRunner
from .devices.base import Device, Marker
from .ledger import Ledger
from .measurements import Measured
from .memory import open_memory
from .slot_allocator import SlotAllocator
from .survival import SurvivalSums
from .task_flow import TaskFlow
from .task_lanes import LaneWork, TaskLanes
from .tasks import ChunkTask, OutputChunk, ReadTask, Sink, Source

NOTIFY_SECONDS = 0.1
"""Seconds between two progress notifications."""


class Executor:
    """Executes one schedule, once.

    Args:
        graph: graph to execute.
        schedule: schedule of the graph.
        devices: devices of the schedule's budget, in its order.
        source: reader of tensor bytes.
        sink: writer of output bytes.
        counters: counters of the bytes read and written; new ones if None.
        ledger: ledger in which the buffers are reserved; one of its own if None.
        readers: number of read threads.
        writers: number of write threads.
        allow_nonfinite: whether a NaN or an infinity is accepted in an input of a computed tensor.
        serial: whether to take no slot ahead of time; for tests.
        resident: see `SlotAllocator`.
        survival: receives the by-products of kernels; None to drop them.
    """

    def __init__(
        self,
        graph: MergeGraph,
        schedule: Schedule,
        devices: Sequence[Device],
        source: Source,
        sink: Sink,
        *,
        counters: IoCounters | None = None,
        ledger: Ledger | None = None,
        readers: int = 2,
        writers: int = 2,
        allow_nonfinite: bool = False,
        serial: bool = False,
        resident: Callable[[], int] | None = None,
        survival: SurvivalSums | None = None,
    ) -> None:
        self.graph = graph
        self.schedule = schedule
        self.devices = devices
        self.measured = Measured(counters or IoCounters())
        self.ledger = ledger or Ledger()
        self.slots = SlotAllocator(graph, schedule, devices, resident=resident, discard=self._discard)
        self._counters = self.measured.io
        self._source = source
        self._sink = sink
        self._survival = survival
        self._serial = serial
        self._started = False
        self._changed = threading.Condition(threading.Lock())
        self._outcome = TaskGroup("executor")
        self._notified = 0.0
        self._destinations = graph.destinations()
        self._threads = (readers, writers)
        self._computes = any(operation.kind is Kind.MERGE for operation in graph.operations)
        self._runner = KernelRunner(graph, schedule, devices, allow_nonfinite=allow_nonfinite)
        self._lanes = TaskLanes(self._fail)
        self._flow = TaskFlow(self.slots, devices, self._lanes)
        self._arena: HostArena
        self._pending_uploads: list[deque[tuple[Marker, ChunkTask]]] = [deque() for _ in devices]

    # --- the main thread ---------------------------------------------------------------------------------------

    def run(self, notify: Callable[[], None] | None = None) -> Measured:
        """Execute the schedule.

        Args:
            notify: function that is called about ten times a second, in this thread; if it raises, the run ends.

        Raises:
            MergeloomError: the first error of any lane.
            RuntimeError: if the executor has run before.
        """
        if self._started:
            raise RuntimeError("this Executor has run already: its cache and counts are used up; make a new one")
        self._started = True
        start = time.perf_counter()
        self._notify = notify or (lambda: None)
        with contextlib.ExitStack() as opened:
            self._arena = opened.enter_context(
                open_memory(self.schedule, self.devices, self.ledger, computes=self._computes)
            )
            if self._computes:
                opened.callback(self._runner.close)
                self._runner.open(self._arena.memory, self._fail)
            try:
                self._start_lanes()
                self._dispatch()
                self._wait(lambda: self._flow.idle)
            finally:
                end = time.perf_counter()
                self._lanes.stop()
            self._measure(start, end)
        return self.measured

    def _start_lanes(self) -> None:
        work = LaneWork(
            read=self._read,
            upload=self._upload,
            settle_uploads=self._settle_uploads,
            compute=self._compute,
            download=self._download,
            write=self._write,
        )
        self._lanes.start(self.devices, *self._threads, work)

    def _measure(self, start: float, end: float) -> None:
        measured = self.measured
        measured.seconds = end - start
        measured.ram_peak = self.slots.ram.peak_bytes
        measured.vram_peak = max((device.peak() for device in self.devices), default=0)
        measured.lanes = self._lanes.times(end)

    def _fail(self, error: BaseException) -> None:
        self._outcome.fail(error)
        with self._changed:
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready` returns True, or raise the first error of a lane. Only the main thread calls it."""
        while True:
            with self._changed:
                if self._outcome.error is None and not ready():
                    self._changed.wait(NOTIFY_SECONDS)
                self._outcome.check()
                done = ready()
            now = time.monotonic()
            if now - self._notified >= NOTIFY_SECONDS:
                self._notified = now
                self._notify()
            if done:
                return

    def _dispatch(self) -> None:
        order = 0
        for step in self.schedule.steps:
            operation = self.graph.operation(step.node)
            chunks = self.schedule.chunks(self.graph, step.node)
            with self._changed:
                self._flow.start_step(step, chunks)
            if chunks == 0:
                if step.index == operation.passes - 1:
                    self._finish_node(step.node)
                continue
            for chunk in range(step.first, chunks):
                order += 1
                if self._serial:
                    self._wait(lambda: self._flow.idle)
                self._start(step, ChunkTask(order, step, operation, chunk))

    def _start(self, step: Step, task: ChunkTask) -> None:
        """Wait until every slot that a task needs is free, and start it."""
        self._wait(lambda: self.slots.available(step, task))
        with self._changed:
            self._flow.start(step, task)

    def _discard(self, slot: int) -> None:
        self._arena.discard(slot)

    # --- the work of the lanes, without a lock -----------------------------------------------------------------

    def _read(self, thread: int, read_task: ReadTask) -> None:
        target, read, ranges = read_task
        ref, view, done = self.graph.reads[read], self._arena.view(target.slot, target.nbytes), 0
        for offset, nbytes in ranges:
            part = view[done : done + nbytes]
            done += nbytes
            if offset < 0:
                part[:] = bytes(nbytes)
            else:
                read_tensor(self._source.read, ref, offset, part)
                self._counters.add(read=nbytes)
        with self._changed:
            self._flow.chunk_loaded(target)

    def _upload(self, thread: int, task: ChunkTask) -> None:
        device = self.devices[task.device]
        for host, on_device in task.uploads:
            device.upload(self._arena.view(host.slot, host.nbytes), on_device.slot)
        task.marker = device.uploads_begun()
        self._pending_uploads[task.device].append((task.marker, task))
        with self._changed:
            self._flow.uploaded(task)
        self._settle_uploads(task.device, 2)

    def _settle_uploads(self, device: int, leave: int = 0) -> None:
        """Release the chunks in RAM whose upload is complete, except those of the last `leave` tasks.

        Only the device's upload thread calls it.
        """
        pending = self._pending_uploads[device]
        while len(pending) > leave:
            marker, task = pending.popleft()
            marker.wait()
            with self._changed:
                self._flow.upload_settled(task)
                self._changed.notify_all()

    def _compute(self, thread: int, task: ChunkTask) -> None:
        try:
            if task.last:
                self._combine(thread, task)
            else:
                self._reduce(thread, task)
        except HostError as error:
            label = self.graph.label(task.node)
            raise UsageError(f"merge method {task.operation.method} fails on tensor {label}: {error}") from error

    def _reduce(self, thread: int, task: ChunkTask) -> None:
        """Reduce a chunk, and merge its partial result into its pass."""
        reducer, kernel = self._flow.nodes[task.node].reducer, task.operation.kernel
        assert kernel is not None
        partial = self._runner.reduce(thread, task, reducer.state)
        complete = reducer.merge(kernel, task.index, task.chunk, partial)
        with self._changed:
            self._flow.reduced(task, complete=complete)
            self._changed.notify_all()

    def _combine(self, thread: int, task: ChunkTask) -> None:
        """Make a chunk of the output; a device with its own memory starts to copy it to RAM."""
        device, overflowed = self.devices[task.device], 0
        if task.operation.kind is Kind.REQUIRE_EQUAL:
            views = [self._arena.view(cached.slot, cached.nbytes) for cached in task.inputs]
            self._runner.compare(task, views, self._output(task.outputs[0]))
        else:
            outcome = self._runner.combine(thread, task, self._flow.nodes[task.node].reducer.state)
            overflowed = outcome.overflowed
            if self._survival is not None and outcome.byproducts:
                first, size = self.schedule.span(self.graph, task.node, task.chunk)
                self._survival.add(task.node, first, size, outcome.byproducts)
            for output in task.outputs if device.separate else ():
                task.marker = device.download(thread, output.on_device, self._output(output))
        with self._changed:
            if overflowed and task.written:
                name = self.graph.outputs[self._destinations[task.node][0]].label
                self.measured.overflowed[name] = self.measured.overflowed.get(name, 0) + overflowed
            self._flow.combined(task)
            self._changed.notify_all()

    def _download(self, thread: int, task: ChunkTask) -> None:
        task.marker.wait()
        with self._changed:
            self._flow.downloaded(task)
            self._changed.notify_all()

    def _write(self, thread: int, task: ChunkTask) -> None:
        first, size = self.schedule.span(self.graph, task.node, task.chunk)
        for output in task.outputs:
            self._sink.write(output.node, made(self.graph, output.node, first, size).offset, self._output(output))
            self._counters.add(written=output.nbytes * len(self._destinations[output.node]))
        with self._changed:
            complete = self._flow.written(task)
            self._changed.notify_all()
        if complete:
            self._finish_node(task.node)
            with self._changed:
                self._flow.end(task)
                self._changed.notify_all()

    def _finish_node(self, node: int) -> None:
        for result in self.graph.results(node):
            if self._destinations[result]:
                self._sink.finished(result)
        with self._changed:
            del self._flow.nodes[node]

    def _output(self, output: OutputChunk) -> memoryview:
        return self._arena.view(output.slot, output.nbytes)
