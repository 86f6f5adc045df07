"""Executes a schedule: read, upload, compute, download and write lanes run concurrently.

The main thread dispatches: it goes through the schedule's steps chunk by chunk and takes the slots of each chunk, in
the order of the plan. It waits while too few are free. A chunk that has its slots depends on no later chunk, so the
wait always ends, and no more is held than the schedule allows.

Lock order: ``Executor._changed`` first, then the lock of a lane or of a node's state. A lane holds none of its locks
while it calls back.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from ...errors import UsageError
from ...io.task_group import TaskGroup
from ...methods.kernel.spec import HostError
from ..graph.extents import output_width
from ..graph.graph import Kind, MergeGraph
from ..schedule.schedule import Schedule
from ..schedule.step_list import Step
from .arena import HostArena
from .cache import CachedChunk
from .devices.base import Device, Marker
from .lanes import Lane, Lanes
from .ledger import RAM, Ledger
from .passes import KernelRunner
from .slot_allocator import SlotAllocator
from .tasks import ChunkTask, Measured, NodeState, Progress, ReadTask, Sink, Source

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
        ledger: ledger in which the buffers are reserved; one of its own if None.
        readers: number of read threads.
        writers: number of write threads.
        allow_nonfinite: whether a NaN or an infinity is accepted in an input of a computed tensor.
        serial: whether to take no slot ahead of time; for tests.
        resident: see `SlotAllocator`.
    """

    def __init__(
        self,
        graph: MergeGraph,
        schedule: Schedule,
        devices: Sequence[Device],
        source: Source,
        sink: Sink,
        *,
        ledger: Ledger | None = None,
        readers: int = 2,
        writers: int = 2,
        allow_nonfinite: bool = False,
        serial: bool = False,
        resident: Callable[[], int] | None = None,
    ) -> None:
        self.graph = graph
        self.schedule = schedule
        self.devices = devices
        self.progress = Progress()
        self.measured = Measured()
        self.ledger = ledger or Ledger()
        self.slots = SlotAllocator(graph, schedule, devices, resident=resident, discard=self._discard)
        self._source = source
        self._sink = sink
        self._serial = serial
        self._started = False
        self._changed = threading.Condition()
        self._outcome = TaskGroup("executor")
        self._in_flight = 0
        self._notified = 0.0
        self._destinations = graph.destinations()
        self._nodes: dict[int, NodeState] = {}
        self._threads = (readers, writers)
        self._computes = any(operation.kind is Kind.MERGE for operation in graph.operations)
        self._passes = KernelRunner(graph, schedule, devices, allow_nonfinite=allow_nonfinite)
        self._pending_uploads: list[deque[tuple[Marker, ChunkTask]]] = [deque() for _ in devices]

    # --- the main thread ---------------------------------------------------------------------------------------

    def run(self, notify: Callable[[Progress], None] | None = None) -> Measured:
        """Execute the schedule.

        Args:
            notify: function that receives the progress about ten times a second, in this thread.

        Raises:
            MergeloomError: the first error of any lane.
            RuntimeError: if the executor has run before.
        """
        if self._started:
            raise RuntimeError("this Executor has run already: its cache and counts are used up; make a new one")
        self._started = True
        start = time.perf_counter()
        self._notify = notify or (lambda progress: None)
        with contextlib.ExitStack() as opened:
            self._open_memory(opened)
            lanes = Lanes(self._fail)
            try:
                self._start_lanes(lanes)
                self._dispatch()
                self._wait(lambda: self._in_flight == 0)
            finally:
                end = time.perf_counter()
                lanes.stop()
            self._measure(lanes, start, end)
        return self.measured

    def _start_lanes(self, lanes: Lanes) -> None:
        """Start all lanes, in the order in which a chunk passes through them."""
        readers, writers = self._threads
        separate = [number for number, device in enumerate(self.devices) if device.separate]
        self._read_lane: Lane[ReadTask] = lanes.start("read", readers, self._read)
        self._upload_lanes: dict[int, Lane[ChunkTask]] = {
            number: lanes.start("upload", 1, self._upload, functools.partial(self._settle_uploads, number, 0))
            for number in separate
        }
        self._compute_lanes: list[Lane[ChunkTask]] = [
            lanes.start("compute", device.threads, self._compute) for device in self.devices
        ]
        self._download_lanes: dict[int, Lane[ChunkTask]] = {
            number: lanes.start("download", 1, self._download) for number in separate
        }
        self._write_lane: Lane[ChunkTask] = lanes.start("write", writers, self._write)

    def _open_memory(self, opened: contextlib.ExitStack) -> None:
        """Reserve and allocate the arena and the devices' memory; `opened` closes and releases them."""
        schedule, ledger = self.schedule, self.ledger
        opened.enter_context(ledger.allow(schedule.buffer_ram))
        opened.enter_context(ledger.reserve("arena", schedule.ram_slots * schedule.slot_bytes))
        if schedule.partials:
            opened.enter_context(ledger.reserve("partial results", schedule.partials))
        self._arena = HostArena(schedule.ram_slots, schedule.slot_bytes)
        opened.callback(self._arena.close)
        if not self._computes:
            return
        opened.callback(self._passes.close)
        self._passes.open(self._arena.memory, self._fail)
        for number, device in enumerate(self.devices):
            memory = RAM
            if device.separate:
                memory = device.name
                opened.enter_context(ledger.allow(schedule.buffer_vram(number), memory))
                nbytes = schedule.vram_slots[number] * schedule.slot_bytes
                opened.enter_context(ledger.reserve("arena", nbytes, memory))
            nbytes = device.threads * schedule.workspace[number]
            opened.enter_context(ledger.reserve("workspaces", nbytes, memory))
            opened.push(functools.partial(_close, device))  # a device whose `open` fails is closed, too
            slots, workspace = schedule.vram_slots[number], schedule.workspace[number]
            device.open(slots, schedule.slot_bytes, workspace, self._arena.memory)

    def _measure(self, lanes: Lanes, start: float, end: float) -> None:
        measured = self.measured
        measured.bytes_read = self.progress.bytes_read
        measured.bytes_written = self.progress.bytes_written
        measured.seconds = end - start
        measured.ram_peak = self.slots.ram.peak_bytes
        measured.vram_peak = max((device.peak() for device in self.devices), default=0)
        measured.lanes = lanes.times(end)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._outcome.fail(error)
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
                self._notify(self.progress)
            if done:
                return

    def _dispatch(self) -> None:
        order = 0
        for step in self.schedule.steps:
            operation = self.graph.operation(step.node)
            chunks = self.schedule.chunks(self.graph, step.node)
            with self._changed:
                self.slots.drop(step)
                if step.index == 0:
                    self._nodes[step.node] = NodeState(chunks)
                if step.first:
                    self._nodes[step.node].next_write = step.first
                    self._nodes[step.node].unwritten -= step.first
            if chunks == 0:
                if step.index == operation.passes - 1:
                    self._finish_node(step.node)
                continue
            for chunk in range(step.first, chunks):
                order += 1
                task = ChunkTask(order, step, operation, chunk)
                if self._serial:
                    self._wait(lambda: self._in_flight == 0)
                for read_task in self._take_slots(step, task):
                    self._read_lane.put(order, read_task)

    def _take_slots(self, step: Step, task: ChunkTask) -> list[ReadTask]:
        """Take every slot that a task needs, waiting until they are free; return the chunks to read."""
        self._wait(lambda: self.slots.available(step, task))
        with self._changed:
            self._in_flight += 1
            reads = self.slots.take(step, task)
            if task.missing == 0:
                self._loaded(task)
            return reads

    def _release_hosts(self, task: ChunkTask) -> None:
        with self._changed:
            self.slots.release_hosts(task)
            self._changed.notify_all()

    def _release_device(self, task: ChunkTask) -> None:
        with self._changed:
            self.slots.release_device(task)
            self._changed.notify_all()

    def _discard(self, slot: int) -> None:
        self._arena.discard(slot)

    # --- lanes -------------------------------------------------------------------------------------------------

    def _read(self, thread: int, read_task: ReadTask) -> None:
        target, read, offset, nbytes = read_task
        self._source.read(self.graph.reads[read].file, offset, self._arena.view(target.slot, nbytes))
        with self._changed:
            self.progress.bytes_read += nbytes
            self._ready(target)

    def _ready(self, cached: CachedChunk) -> None:
        cached.ready = True
        for task in cached.waiting:
            task.missing -= 1
            if task.missing == 0:
                self._loaded(task)
        cached.waiting = []

    def _loaded(self, task: ChunkTask) -> None:
        """Pass on a task whose source chunks have all been loaded."""
        if task.operation.kind is Kind.COPY:
            self._computed(task)
        elif task.operation.kind is Kind.MERGE and self.devices[task.device].separate:
            self._upload_lanes[task.device].put(task.order, task)
        else:
            self._computable(task)

    def _computable(self, task: ChunkTask) -> None:
        node = self._nodes[task.node]
        with self._changed:
            if node.index == task.index:
                self._compute_lanes[task.device].put(task.order, task)
            else:
                node.waiting.append(task)

    def _upload(self, thread: int, task: ChunkTask) -> None:
        device = self.devices[task.device]
        for host, on_device in task.uploads:
            device.upload(self._arena.view(host.slot, host.nbytes), on_device.slot)
        task.marker = device.uploads_begun()
        with self._changed:
            for _, on_device in task.uploads:
                self._ready(on_device)
        pending = self._pending_uploads[task.device]
        pending.append((task.marker, task))
        self._computable(task)
        self._settle_uploads(task.device, 2)

    def _settle_uploads(self, device: int, leave: int) -> None:
        """Release the chunks in RAM whose upload is complete, except those of the last `leave` tasks."""
        pending = self._pending_uploads[device]
        while len(pending) > leave:
            marker, task = pending.popleft()
            marker.wait()
            self._release_hosts(task)

    def _compute(self, thread: int, task: ChunkTask) -> None:
        try:
            self._compute_chunk(thread, task)
        except HostError as error:
            label = self.graph.label(task.node)
            raise UsageError(f"merge method {task.operation.method} fails on tensor {label}: {error}") from error

    def _compute_chunk(self, thread: int, task: ChunkTask) -> None:
        if task.operation.kind is Kind.REQUIRE_EQUAL:
            views = [self._arena.view(cached.slot, cached.nbytes) for cached in task.inputs]
            self._passes.compare(task, views, self._arena.view(task.out, task.out_nbytes))
            self._release_hosts(task)
            self._computed(task)
            return
        node, device = self._nodes[task.node], self.devices[task.device]
        if not task.last:
            self._reduced(task, self._passes.reduce(thread, task, node.state))
            return
        overflowed = self._passes.combine(thread, task, node.state)
        if overflowed:
            self._note_overflow(task, overflowed)
        if device.separate:
            target = self._arena.view(task.out, task.out_nbytes)
            task.marker = device.download(thread, task.out_device, target)
            self._download_lanes[task.device].put(task.order, task)
        else:
            self._release_hosts(task)
            self._computed(task)

    def _reduced(self, task: ChunkTask, partial: Any) -> None:
        """Merge a partial result into its pass; after the last one, start the next pass."""
        node, kernel = self._nodes[task.node], task.operation.kernel
        assert kernel is not None
        complete = node.merge(kernel, task.index, task.chunk, partial)
        if self.devices[task.device].separate:
            self._release_device(task)
        else:
            self._release_hosts(task)
        with self._changed:
            self._in_flight -= 1
            if complete:
                node.index += 1
                waiting, node.waiting = node.waiting, []
                for other in waiting:
                    self._computable(other)
            self._changed.notify_all()

    def _download(self, thread: int, task: ChunkTask) -> None:
        task.marker.wait()
        self._release_device(task)
        self._computed(task)

    def _computed(self, task: ChunkTask) -> None:
        """Queue finished chunks for the write lane in the order of the tensor, since digests are computed there."""
        with self._changed:
            node = self._nodes[task.node]
            node.computed[task.chunk] = task
            while (following := node.computed.pop(node.next_write, None)) is not None:
                self._write_lane.put(following.order, following)
                node.next_write += 1

    def _write(self, thread: int, task: ChunkTask) -> None:
        slot = task.inputs[0].slot if task.operation.kind is Kind.COPY else task.out
        data = self._arena.view(slot, task.out_nbytes)
        offset = self.schedule.span(self.graph, task.node, task.chunk)[0] * output_width(self.graph, task.node)
        self._sink.write(task.node, offset, data)
        if task.operation.kind is Kind.COPY:
            self._release_hosts(task)
        with self._changed:
            self.slots.free_output(task)
            self.progress.bytes_written += task.out_nbytes * len(self._destinations[task.node])
            node = self._nodes[task.node]
            node.unwritten -= 1
            complete = node.unwritten == 0
        if complete:
            self._finish_node(task.node)
        with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    def _finish_node(self, node: int) -> None:
        self._sink.finished(node)
        with self._changed:
            del self._nodes[node]

    def _note_overflow(self, task: ChunkTask, count: int) -> None:
        with self._changed:
            name = self.graph.outputs[self._destinations[task.node][0]].label
            self.measured.overflowed[name] = self.measured.overflowed.get(name, 0) + count


def _close(
    device: Device, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    """Close a device. If it fails again after an earlier error, the earlier error is raised."""
    try:
        device.close()
    except RuntimeError:
        if error is None:
            raise
