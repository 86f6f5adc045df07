"""Performs a schedule: lanes for reading, copying to the device, computing, copying back and writing run side by side.

The main thread dispatches: it goes through the schedule's steps chunk by chunk, takes the slots that a chunk needs in
the order of the plan, and waits where none is free. A chunk that has its slots needs nothing else to be finished, so
that waiting always ends, and no more is held than the schedule allows.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import zip_longest
from types import TracebackType
from typing import Any

from ..graph.graph import Kind, MergeGraph
from ..schedule.schedule import Schedule
from ..schedule.simulate import Step
from ..schedule.tiling import ChunkedRead, output_width, source_width
from .arena import HostArena, Ledger
from .cache import CachedChunk, ChunkCache
from .devices.base import Device, Marker
from .lane import Lane
from .passes import KernelRunner
from .tasks import ChunkTask, LaneTime, Measured, NodeState, Progress, Sink, Source

NOTIFY_SECONDS = 0.1
"""How often `Executor.run` tells how far it is."""


class Executor:
    """Performs one schedule, once.

    Args:
        graph: what to make.
        schedule: how.
        devices: those of the schedule's budget, in its order.
        source: where tensor bytes come from.
        sink: where they go.
        readers: threads that read.
        writers: threads that write.
        allow_nonfinite: whether a NaN or an infinity in an input is let through.
        serial: take no slot ahead of time; for tests.
    """

    def __init__(
        self,
        graph: MergeGraph,
        schedule: Schedule,
        devices: Sequence[Device],
        source: Source,
        sink: Sink,
        *,
        readers: int = 2,
        writers: int = 1,
        allow_nonfinite: bool = False,
        serial: bool = False,
    ) -> None:
        self.graph = graph
        self.schedule = schedule
        self.devices = devices
        self.progress = Progress()
        self.measured = Measured()
        self.ledger = Ledger()
        self._source = source
        self._sink = sink
        self._serial = serial
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._in_flight = 0
        self._notified = 0.0
        self._destinations = graph.destinations()
        self._ram = ChunkCache(self.ledger, "ram", schedule.ram_slots, schedule.slot_bytes)
        self._vram = [
            ChunkCache(self.ledger, f"vram {number}", count, schedule.slot_bytes)
            for number, count in enumerate(schedule.vram_slots)
        ]
        self._nodes: dict[int, NodeState] = {}
        self._threads = (readers, writers)
        self._computes = any(operation.kind is Kind.MERGE for operation in graph.operations)
        self._passes = KernelRunner(graph, schedule, devices, allow_nonfinite=allow_nonfinite)
        self._pending_uploads: list[deque[tuple[Marker, ChunkTask]]] = [deque() for _ in devices]

    # --- the main thread ---------------------------------------------------------------------------------------

    def run(self, notify: Callable[[Progress], None] | None = None) -> Measured:
        """Perform the schedule.

        Args:
            notify: called now and then, from this thread.

        Raises:
            MergeloomError: what went wrong in any lane.
        """
        start = time.perf_counter()
        self._notify = notify or (lambda progress: None)
        with contextlib.ExitStack() as opened:
            self._arena = HostArena(self.schedule.ram_slots, self.schedule.slot_bytes)
            opened.callback(self._arena.close)
            self._open_devices(opened)
            lanes: list[Lane[Any]] = []
            try:
                lanes += self._make_lanes()
                self._dispatch()
                self._wait(lambda: self._in_flight == 0)
            finally:
                end = time.perf_counter()
                for lane in lanes:
                    lane.stop()
                for lane in lanes:
                    lane.join()
            self._account(lanes, start, end)
        return self.measured

    def _make_lanes(self) -> list[Lane[Any]]:
        """All lanes, in the order in which a chunk goes through them."""
        readers, writers = self._threads
        self._read_lane: Lane[tuple[CachedChunk, int, int, int]] = Lane("read", readers, self._read, self._fail)
        self._write_lane: Lane[ChunkTask] = Lane("write", writers, self._write, self._fail)
        self._upload_lanes: dict[int, Lane[ChunkTask]] = {}
        self._compute_lanes: list[Lane[ChunkTask]] = []
        self._download_lanes: dict[int, Lane[ChunkTask]] = {}
        for number, device in enumerate(self.devices):
            self._compute_lanes.append(Lane("compute", device.threads, self._compute, self._fail))
            if device.separate:
                settle = functools.partial(self._settle_uploads, number, 0)
                self._upload_lanes[number] = Lane("upload", 1, self._upload, self._fail, settle)
                self._download_lanes[number] = Lane("download", 1, self._download, self._fail)
        return [
            self._read_lane,
            *self._upload_lanes.values(),
            *self._compute_lanes,
            *self._download_lanes.values(),
            self._write_lane,
        ]

    def _open_devices(self, opened: contextlib.ExitStack) -> None:
        """Open the devices, to be closed with `opened`: those, too, that others were opened before in vain."""
        if not self._computes:
            return
        host = self._passes.open(self._arena.memory)
        opened.callback(self._passes.close)
        for number, device in enumerate(self.devices):
            opened.push(functools.partial(_close, device))
            device.open(
                self.schedule.vram_slots[number],
                self.schedule.slot_bytes,
                self.schedule.workspace[number],
                host,
            )

    def _account(self, lanes: Sequence[Lane[Any]], start: float, end: float) -> None:
        measured = self.measured
        measured.bytes_read = self.progress.bytes_read
        measured.bytes_written = self.progress.bytes_written
        measured.seconds = end - start
        measured.ram_peak = self.ledger.peak("ram")
        measured.vram_peak = max((device.peak() for device in self.devices), default=0)
        for lane in lanes:
            before = measured.lanes.get(lane.name, LaneTime(0, 0.0, 0.0))
            measured.lanes[lane.name] = LaneTime(
                before.threads + len(lane.worked),
                before.worked + lane.seconds_worked,
                before.waited + lane.seconds_waited(end),
                tuple(a + b for a, b in zip_longest(before.levels, lane.levels, fillvalue=0.0)),
            )

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait, in the main thread, until `ready`; raise what a lane raised. Only this thread makes it untrue again."""
        while True:
            with self._changed:
                if self._error is None and not ready():
                    self._changed.wait(NOTIFY_SECONDS)
                if self._error is not None:
                    raise self._error
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
                for source, held in step.drop:
                    self._ram.trim(source, held.low, held.high)
                    self._vram[step.device].trim(source, 0, held.vram)
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
                item = ChunkTask(order, step, operation, chunk)
                if self._serial:
                    self._wait(lambda: self._in_flight == 0)
                for task in self._take_slots(step, item):
                    self._read_lane.put(order, task)

    # --- slots -------------------------------------------------------------------------------------------------

    def _take_slots(self, step: Step, item: ChunkTask) -> list[tuple[CachedChunk, int, int, int]]:
        """Reserve every slot that the item needs, waiting for them; what has to be read for it."""
        chunk_length = self.schedule.chunk_elements[item.node]
        separate = self.devices[item.device].separate and item.operation.kind is Kind.MERGE
        computes = item.operation.kind is not Kind.COPY
        sources = [ChunkedRead(read, chunk_length) for read in step.sources]
        ram, vram = self._ram, self._vram[item.device]

        def ready() -> bool:
            out = int(item.last and computes)
            uploads = [source for source in sources if separate and vram.find(source, item.chunk) is None]
            reads = [source for source in (uploads if separate else sources) if ram.find(source, item.chunk) is None]
            return ram.free_slots >= len(reads) + out and (not separate or vram.free_slots >= len(uploads) + out)

        self._wait(ready)
        with self._changed:
            self._in_flight += 1
            reads = []
            for source, held in zip(sources, step.keep, strict=True):
                on_device = vram.find(source, item.chunk) if separate else None
                if on_device is None:
                    offset, nbytes = self._extent(item, source.read)
                    host = ram.find(source, item.chunk)
                    if host is None:
                        host = ram.load(source, item.chunk, nbytes)
                        reads.append((host, source.read, offset, nbytes))
                    host.acquire(pinned=held.low <= item.chunk < held.high)
                    item.await_(host)
                    item.hosts.append(host)
                    if separate:
                        on_device = vram.load(source, item.chunk, nbytes)
                        item.uploads.append((host, on_device))
                    else:
                        item.residents.append(host)
                else:
                    item.await_(on_device)
                if on_device is not None:
                    on_device.acquire(pinned=item.chunk < held.vram)
                    item.residents.append(on_device)
            if item.last:
                _, size = self.schedule.span(self.graph, item.node, item.chunk)
                item.out_nbytes = size * output_width(self.graph, item.node)
                if computes:
                    item.out = ram.take()
                    if separate:
                        item.out_device = vram.take()
            if item.missing == 0:
                self._loaded(item)
            return reads

    def _extent(self, item: ChunkTask, read: int) -> tuple[int, int]:
        """The offset of a source's chunk in its file, and its size, in bytes."""
        width = source_width(self.graph, item.node, read)
        start, size = self.schedule.span(self.graph, item.node, item.chunk)
        return self.graph.reads[read].offset + start * width, size * width

    def _release_hosts(self, item: ChunkTask) -> None:
        with self._changed:
            for resident in item.hosts:
                self._ram.release(resident)
            item.hosts = []
            self._changed.notify_all()

    def _release_device(self, item: ChunkTask) -> None:
        with self._changed:
            for resident in item.residents:
                self._vram[item.device].release(resident)
            if item.out_device >= 0:
                self._vram[item.device].free(item.out_device)
            self._changed.notify_all()

    # --- lanes -------------------------------------------------------------------------------------------------

    def _read(self, thread: int, task: tuple[CachedChunk, int, int, int]) -> None:
        resident, read, offset, nbytes = task
        self._source.read(self.graph.reads[read].file, offset, self._arena.view(resident.slot, nbytes))
        with self._changed:
            self.progress.bytes_read += nbytes
            self._ready(resident)

    def _ready(self, resident: CachedChunk) -> None:
        resident.ready = True
        for item in resident.waiting:
            item.missing -= 1
            if item.missing == 0:
                self._loaded(item)
        resident.waiting = []

    def _loaded(self, item: ChunkTask) -> None:
        """Every source chunk of the item is in its place."""
        if item.operation.kind is Kind.COPY:
            self._computed(item)
        elif item.operation.kind is Kind.MERGE and self.devices[item.device].separate:
            self._upload_lanes[item.device].put(item.order, item)
        else:
            self._computable(item)

    def _computable(self, item: ChunkTask) -> None:
        node = self._nodes[item.node]
        with self._changed:
            if node.index == item.index:
                self._compute_lanes[item.device].put(item.order, item)
            else:
                node.waiting.append(item)

    def _upload(self, thread: int, item: ChunkTask) -> None:
        device = self.devices[item.device]
        for host, on_device in item.uploads:
            device.upload(self._passes.host_bytes(host.slot, host.nbytes), on_device.slot)
        item.marker = device.uploads_begun()
        with self._changed:
            for _, on_device in item.uploads:
                self._ready(on_device)
        pending = self._pending_uploads[item.device]
        pending.append((item.marker, item))
        self._computable(item)
        self._settle_uploads(item.device, 2)

    def _settle_uploads(self, device: int, leave: int) -> None:
        """Give back the slots in RAM of uploads that are done, but for the last few."""
        pending = self._pending_uploads[device]
        while len(pending) > leave:
            marker, item = pending.popleft()
            marker.wait()
            self._release_hosts(item)

    def _compute(self, thread: int, item: ChunkTask) -> None:
        if item.operation.kind is Kind.REQUIRE_EQUAL:
            views = [self._arena.view(resident.slot, resident.nbytes) for resident in item.residents]
            self._passes.compare(item, views, self._arena.view(item.out, item.out_nbytes))
            self._release_hosts(item)
            self._computed(item)
            return
        node, device = self._nodes[item.node], self.devices[item.device]
        if not item.last:
            self._reduced(item, self._passes.reduce(thread, item, node.state))
            return
        overflowed = self._passes.combine(thread, item, node.state)
        if overflowed:
            self._note_overflow(item, overflowed)
        if device.separate:
            target = self._passes.host_bytes(item.out, item.out_nbytes)
            item.marker = device.download(thread, item.out_device, target)
            self._download_lanes[item.device].put(item.order, item)
        else:
            self._release_hosts(item)
            self._computed(item)

    def _reduced(self, item: ChunkTask, partial: Any) -> None:
        """Merge a partial into its pass; with the last one, open the next pass."""
        node, kernel = self._nodes[item.node], item.operation.kernel
        assert kernel is not None
        whole = node.merge(kernel, item.index, item.chunk, partial)
        if self.devices[item.device].separate:
            self._release_device(item)
        else:
            self._release_hosts(item)
        with self._changed:
            self._in_flight -= 1
            if whole:
                node.index += 1
                waiting, node.waiting = node.waiting, []
                for other in waiting:
                    self._computable(other)
            self._changed.notify_all()

    def _download(self, thread: int, item: ChunkTask) -> None:
        item.marker.wait()
        self._release_device(item)
        self._computed(item)

    def _computed(self, item: ChunkTask) -> None:
        """Hand finished chunks to the write lane in the order of the tensor, so that they can be digested there."""
        with self._changed:
            node = self._nodes[item.node]
            node.computed[item.chunk] = item
            while (following := node.computed.pop(node.next_write, None)) is not None:
                self._write_lane.put(following.order, following)
                node.next_write += 1

    def _write(self, thread: int, item: ChunkTask) -> None:
        slot = item.residents[0].slot if item.operation.kind is Kind.COPY else item.out
        data = self._arena.view(slot, item.out_nbytes)
        offset = self.schedule.span(self.graph, item.node, item.chunk)[0] * output_width(self.graph, item.node)
        self._sink.write(item.node, offset, data)
        if item.operation.kind is Kind.COPY:
            self._release_hosts(item)
        with self._changed:
            if item.out >= 0:
                self._ram.free(item.out)
            self.progress.bytes_written += item.out_nbytes * len(self._destinations[item.node])
            node = self._nodes[item.node]
            node.unwritten -= 1
            whole = node.unwritten == 0
        if whole:
            self._finish_node(item.node)
        with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    def _finish_node(self, node: int) -> None:
        self._sink.finished(node)
        with self._changed:
            del self._nodes[node]

    def _note_overflow(self, item: ChunkTask, count: int) -> None:
        with self._changed:
            name = self.graph.outputs[self._destinations[item.node][0]].label
            self.measured.overflowed[name] = self.measured.overflowed.get(name, 0) + count


def _close(
    device: Device, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    """Close a device. One that has failed may fail again here: what went wrong first is what is raised."""
    try:
        device.close()
    except RuntimeError:
        if error is None:
            raise
