"""Performs a schedule: lanes for reading, copying to the device, computing, copying back and writing run side by side.

The main thread dispatches: it goes through the schedule's steps chunk by chunk, takes the slots that a chunk needs in
the order of the plan, and waits where none is free. A chunk that has its slots needs nothing else to be finished, so
that waiting always ends, and no more is held than the schedule allows.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .arena import HostArena, Ledger
from .device import Device, Marker
from .graph import Kind, MergeGraph
from .lanes import Lane
from .residency import Memory, Resident
from .schedule import Schedule
from .simulate import Step
from .tiling import length, output_width, tile_length
from .work import Item, LaneTime, Measured, Progress, Run, Sink, Source

if TYPE_CHECKING:
    from torch import Tensor


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
        self._allow_nonfinite = allow_nonfinite
        self._serial = serial
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._in_flight = 0
        self._notified = 0.0
        self._destinations = graph.destinations()
        self._ram = Memory(self.ledger, "ram", schedule.ram_slots, schedule.slot_bytes)
        self._vram = [
            Memory(self.ledger, f"vram {number}", count, schedule.slot_bytes)
            for number, count in enumerate(schedule.vram_slots)
        ]
        self._runs: dict[int, Run] = {}
        self._threads = (readers, writers)
        self._computes = any(operation.kind is Kind.MERGE for operation in graph.operations)
        self._workspaces: dict[tuple[int, int], Any] = {}
        self._pending_uploads: list[deque[tuple[Marker, Item]]] = [deque() for _ in devices]

    # --- the main thread ---------------------------------------------------------------------------------------

    def run(self, notify: Callable[[Progress], None] | None = None) -> Measured:
        """Perform the schedule.

        Args:
            notify: called now and then, from this thread.

        Raises:
            MergeloomError: what went wrong in any lane.
        """
        start = time.perf_counter()
        self._arena = HostArena(self.schedule.ram_slots, self.schedule.slot_bytes)
        self._host_tensor: Tensor | None = None
        self._notify = notify or (lambda progress: None)
        self._open_devices()
        readers, writers = self._threads
        self._read_lane: Lane[tuple[Resident, int, int, int]] = Lane("read", readers, self._read, self._fail)
        self._write_lane: Lane[Item] = Lane("write", writers, self._write, self._fail)
        self._upload_lanes: dict[int, Lane[Item]] = {}
        self._compute_lanes: list[Lane[Item]] = []
        self._download_lanes: dict[int, Lane[Item]] = {}
        for number, device in enumerate(self.devices):
            self._compute_lanes.append(Lane("compute", device.threads, self._compute, self._fail))
            if device.separate:
                settle = functools.partial(self._settle_uploads, number, 0)
                self._upload_lanes[number] = Lane("upload", 1, self._upload, self._fail, settle)
                self._download_lanes[number] = Lane("download", 1, self._download, self._fail)
        lanes: list[Lane[Any]] = [self._read_lane, *self._upload_lanes.values(), *self._compute_lanes]
        lanes += [*self._download_lanes.values(), self._write_lane]
        try:
            self._dispatch()
            self._wait(lambda: self._in_flight == 0)
        finally:
            end = time.perf_counter()
            for lane in lanes:
                lane.stop()
            for lane in lanes:
                lane.join()
            self._account(lanes, start, end)
            for device in self.devices:
                device.close()
            self._workspaces.clear()
            self._host_tensor = None
            self._arena.close()
        return self.measured

    def _open_devices(self) -> None:
        if not self._computes:
            return
        import torch

        host = self._host_tensor = torch.frombuffer(self._arena.memory, dtype=torch.uint8)
        for number, device in enumerate(self.devices):
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
                for read, held in step.drop:
                    self._ram.keep_only(read, held.low, held.high)
                if step.index == 0:
                    self._runs[step.node] = Run(chunks)
                if step.first:
                    self._runs[step.node].next_write = step.first
                    self._runs[step.node].unwritten -= step.first
            if chunks == 0:
                if step.index == operation.passes - 1:
                    self._finish_node(step.node)
                continue
            for chunk in range(step.first, chunks):
                order += 1
                item = Item(order, step, operation, chunk)
                if self._serial:
                    self._wait(lambda: self._in_flight == 0)
                for task in self._take_slots(step, item):
                    self._read_lane.put(order, task)

    # --- slots -------------------------------------------------------------------------------------------------

    def _take_slots(self, step: Step, item: Item) -> list[tuple[Resident, int, int, int]]:
        """Reserve every slot that the item needs, waiting for them; what has to be read for it."""
        chunk_length = self.schedule.chunk_elements[item.node]
        separate = self.devices[item.device].separate and item.operation.kind is Kind.MERGE
        computes = item.operation.kind is not Kind.COPY
        keys = [(read, chunk_length, item.chunk) for read in step.sources]

        ram, vram = self._ram, self._vram[item.device]

        def ready() -> bool:
            out = int(item.last and computes)
            uploads = [key for key in keys if separate and vram.find(key) is None]
            reads = [key for key in (uploads if separate else keys) if ram.find(key) is None]
            return ram.free >= len(reads) + out and (not separate or vram.free >= len(uploads) + out)

        self._wait(ready)
        with self._changed:
            self._in_flight += 1
            reads = []
            for key, held in zip(keys, step.keep, strict=True):
                start, nbytes, offset = self._extent(item, key)
                on_device = vram.find(key) if separate else None
                if on_device is None:
                    host = ram.find(key)
                    if host is None:
                        host = ram.load(key, nbytes)
                        reads.append((host, key[0], offset + start, nbytes))
                    host.hold(pinned=held.low <= item.chunk < held.high)
                    item.await_(host)
                    item.hosts.append(host)
                    if separate:
                        on_device = vram.load(key, nbytes)
                        item.uploads.append((host, on_device))
                    else:
                        item.residents.append(host)
                else:
                    item.await_(on_device)
                if on_device is not None:
                    on_device.hold(pinned=item.chunk < held.vram)
                    item.residents.append(on_device)
            if item.last:
                start, size = self._span(item)
                item.out_nbytes = size * output_width(self.graph, item.node)
                if computes:
                    item.out = ram.take()
                    if separate:
                        item.out_device = vram.take()
            if item.missing == 0:
                self._loaded(item)
            return reads

    def _span(self, item: Item) -> tuple[int, int]:
        """The first element of the item's chunk and how many it has (bytes, where nothing is computed)."""
        chunk = self.schedule.chunk_elements[item.node]
        start = item.chunk * chunk
        return start, min(chunk, length(self.graph, item.node) - start)

    def _extent(self, item: Item, key: tuple[int, int, int]) -> tuple[int, int, int]:
        """Where a source's chunk lies: bytes from the tensor's start, its size, the tensor's offset in the file."""
        ref = self.graph.reads[key[0]]
        width = ref.dtype.bits // 8 if item.operation.kind is Kind.MERGE else 1
        start, size = self._span(item)
        return start * width, size * width, ref.offset

    def _release_hosts(self, item: Item) -> None:
        with self._changed:
            for resident in item.hosts:
                self._ram.release(resident)
            item.hosts = []
            self._changed.notify_all()

    def _release_device(self, item: Item) -> None:
        with self._changed:
            for resident in item.residents:
                self._vram[item.device].release(resident)
            if item.out_device >= 0:
                self._vram[item.device].give_back(item.out_device)
            self._changed.notify_all()

    # --- lanes -------------------------------------------------------------------------------------------------

    def _read(self, thread: int, task: tuple[Resident, int, int, int]) -> None:
        resident, read, offset, nbytes = task
        self._source.read(self.graph.reads[read].file, offset, self._arena.view(resident.slot, nbytes))
        with self._changed:
            self.progress.bytes_read += nbytes
            self._ready(resident)

    def _ready(self, resident: Resident) -> None:
        resident.ready = True
        for item in resident.waiting:
            item.missing -= 1
            if item.missing == 0:
                self._loaded(item)
        resident.waiting = []

    def _loaded(self, item: Item) -> None:
        """Every source chunk of the item is in its place."""
        if item.operation.kind is Kind.COPY:
            self._computed(item)
        elif item.operation.kind is Kind.MERGE and self.devices[item.device].separate:
            self._upload_lanes[item.device].put(item.order, item)
        else:
            self._computable(item)

    def _computable(self, item: Item) -> None:
        run = self._runs[item.node]
        with self._changed:
            if run.index == item.index:
                self._compute_lanes[item.device].put(item.order, item)
            else:
                run.waiting.append(item)

    def _upload(self, thread: int, item: Item) -> None:
        device = self.devices[item.device]
        for host, on_device in item.uploads:
            device.upload(self._host_bytes(host.slot, host.nbytes), on_device.slot)
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

    def _host_bytes(self, slot: int, nbytes: int) -> Tensor:
        assert self._host_tensor is not None
        start = slot * self.schedule.slot_bytes
        return self._host_tensor[start : start + nbytes]

    def _compute(self, thread: int, item: Item) -> None:
        if item.operation.kind is Kind.SAME:
            self._compare(item)
            return
        from . import compute

        kernel = item.operation.kernel
        assert kernel is not None
        device = self.devices[item.device]
        run = self._runs[item.node]
        device.begin(thread, item.marker)
        places = dict(zip(dict.fromkeys(self.graph.node_sources[item.node]), item.residents, strict=True))
        inputs = []
        for read in self.graph.node_sources[item.node]:
            resident = places[read]
            raw = (device.slot if device.separate else self._host_bytes)(resident.slot, resident.nbytes)
            inputs.append(raw.view(compute.torch_dtype(self.graph.reads[read].dtype)))
        piece = compute.Piece(
            kernel=kernel,
            inputs=inputs,
            element=self._span(item)[0],
            key=self.graph.node_key[item.node],
            positions=item.operation.positions,
            tile=tile_length(self.graph, item.node, self.schedule.tile_elements[item.device]),
        )
        workspace = self._workspace(thread, item.device)
        if item.index == 0 and not kernel.transparent and not self._allow_nonfinite:
            self._refuse_nonfinite(item, compute.check_inputs(piece, workspace))
        if not item.last:
            partial = (
                compute.reduce_chunk(piece, item.index, run.state, workspace)
                if kernel.needed(item.index, run.state)
                else None
            )
            self._reduced(item, run, partial)
            return
        if device.separate:
            target = device.slot(item.out_device, item.out_nbytes)
        else:
            target = self._host_bytes(item.out, item.out_nbytes)
        outcome = compute.combine_chunk(
            piece, run.state, workspace, target.view(compute.torch_dtype(self.graph.node_dtype[item.node]))
        )
        if not self._allow_nonfinite:
            self._refuse_nonfinite(item, outcome.nonfinite_inputs)
        if outcome.overflowed:
            self._note_overflow(item, outcome.overflowed)
        if device.separate:
            item.marker = device.download(thread, item.out_device, self._host_bytes(item.out, item.out_nbytes))
            self._download_lanes[item.device].put(item.order, item)
        else:
            self._release_hosts(item)
            self._computed(item)

    def _workspace(self, thread: int, device: int) -> Any:
        import torch

        from ..methods.tile import Workspace

        found = self._workspaces.get((thread, device))
        if found is None:
            memory = self.devices[device].workspace(thread)
            found = self._workspaces[(thread, device)] = Workspace(memory, torch.float32)
        return found

    def _reduced(self, item: Item, run: Run, partial: Any) -> None:
        """Merge a partial in the order of the chunks; with the last one, open the next pass."""
        kernel = item.operation.kernel
        assert kernel is not None
        with run.lock:
            run.partials[item.chunk] = partial
            while run.next in run.partials:
                following = run.partials.pop(run.next)
                if following is not None:
                    run.merged = following if run.merged is None else kernel.merge(item.index, run.merged, following)
                run.next += 1
            whole = run.next == run.chunks
            if whole:
                if kernel.needed(item.index, run.state):
                    run.state = kernel.finish(item.index, run.merged, run.state)
                run.next, run.merged = 0, None
        if self.devices[item.device].separate:
            self._release_device(item)
        else:
            self._release_hosts(item)
        with self._changed:
            self._in_flight -= 1
            if whole:
                run.index += 1
                waiting, run.waiting = run.waiting, []
                for other in waiting:
                    self._computable(other)
            self._changed.notify_all()

    def _download(self, thread: int, item: Item) -> None:
        item.marker.wait()
        self._release_device(item)
        self._computed(item)

    def _compare(self, item: Item) -> None:
        """Integer tensors are copied where all inputs agree."""
        views = [self._arena.view(resident.slot, resident.nbytes) for resident in item.residents]
        reads = list(dict.fromkeys(self.graph.node_sources[item.node]))
        for read, view in zip(reads[1:], views[1:], strict=True):
            if view != views[0]:
                raise CheckpointError(
                    f"tensor {self._output_name(item.node)}: its {self.graph.reads[read].dtype.name} values differ "
                    f"between {self._model(reads[0])} and {self._model(read)}; integer tensors are only copied, where "
                    "they are equal in all models"
                )
        self._arena.view(item.out, item.out_nbytes)[:] = views[0]
        self._release_hosts(item)
        self._computed(item)

    def _computed(self, item: Item) -> None:
        """Hand finished chunks to the write lane in the order of the tensor, so that they can be digested there."""
        with self._changed:
            run = self._runs[item.node]
            run.computed[item.chunk] = item
            while (following := run.computed.pop(run.next_write, None)) is not None:
                self._write_lane.put(following.order, following)
                run.next_write += 1

    def _write(self, thread: int, item: Item) -> None:
        slot = item.residents[0].slot if item.operation.kind is Kind.COPY else item.out
        data = self._arena.view(slot, item.out_nbytes)
        offset = self._span(item)[0] * output_width(self.graph, item.node)
        self._sink.write(item.node, offset, data)
        if item.operation.kind is Kind.COPY:
            self._release_hosts(item)
        with self._changed:
            if item.out >= 0:
                self._ram.give_back(item.out)
            self.progress.bytes_written += item.out_nbytes * len(self._destinations[item.node])
            run = self._runs[item.node]
            run.unwritten -= 1
            whole = run.unwritten == 0
        if whole:
            self._finish_node(item.node)
        with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    def _finish_node(self, node: int) -> None:
        self._sink.finished(node)
        with self._changed:
            self.progress.nodes_done += 1
            del self._runs[node]

    # --- what is said to people --------------------------------------------------------------------------------

    def _output_name(self, node: int) -> str:
        return self.graph.outputs[self._destinations[node][0]].label

    def _model(self, read: int) -> str:
        return self.graph.models[self.graph.read_models[read]]

    def _refuse_nonfinite(self, item: Item, inputs: Sequence[int]) -> None:
        if inputs:
            read = self.graph.node_sources[item.node][inputs[0]]
            raise CheckpointError(
                f"tensor {self.graph.read_names[read]} of {self._model(read)} holds NaN or infinite values: the model "
                "is damaged, or overflowed in training; `allow_nonfinite: true` in the recipe merges it all the same"
            )

    def _note_overflow(self, item: Item, count: int) -> None:
        with self._changed:
            name = self._output_name(item.node)
            self.measured.overflowed[name] = self.measured.overflowed.get(name, 0) + count
