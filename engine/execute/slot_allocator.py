"""Slots of tasks: a task takes all its slots before any of its work starts, and frees them as the work completes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..graph.extents import extent, output_width
from ..graph.graph import Kind, MergeGraph
from ..schedule.schedule import Schedule
from ..schedule.step_list import Step
from ..schedule.tiling import ChunkedRead, chunked_sources
from .arena import MemoryWatch
from .cache import ChunkCache
from .devices.base import Device
from .ledger import RAM
from .tasks import ChunkTask, ReadTask


class SlotAllocator:
    """Takes and frees the slots of tasks, in RAM and on the devices. Not locked: the executor holds its lock.

    Args:
        graph: graph to execute.
        schedule: schedule of the graph.
        devices: devices of the schedule's budget, in its order.
        resident: function that measures the process's resident memory in bytes; if it nears the budget, slots are
            withheld, so fewer chunks are read ahead. None to withhold none.
        discard: function that returns the pages of a free slot in RAM to the system.

    Attributes:
        ram: cache in RAM.
        vram: cache of each device; without slots if the device computes in RAM.
    """

    def __init__(
        self,
        graph: MergeGraph,
        schedule: Schedule,
        devices: Sequence[Device],
        *,
        resident: Callable[[], int] | None = None,
        discard: Callable[[int], None] | None = None,
    ) -> None:
        self._graph = graph
        self._schedule = schedule
        self._devices = devices
        if any(device.separate for device in devices):
            resident = discard = None  # a GPU's driver pins all pages of the arena
        self.ram = ChunkCache(
            RAM,
            schedule.ram_slots,
            schedule.slot_bytes,
            # with these, every step can be executed one chunk after another, so the wait for slots always ends
            minimum=schedule.serial_ram // schedule.slot_bytes,
            watch=MemoryWatch(schedule.budget.ram, resident),
            discard=discard,
        )
        self.vram = [
            ChunkCache(device.name, count, schedule.slot_bytes)
            for device, count in zip(schedule.budget.devices, schedule.vram_slots, strict=True)
        ]

    @property
    def all_free(self) -> bool:
        """Whether no slot is taken."""
        counts = (self._schedule.ram_slots, *self._schedule.vram_slots)
        return all(cache.free_slots == count for cache, count in zip((self.ram, *self.vram), counts, strict=True))

    def drop(self, step: Step) -> None:
        """Free the cached chunks that the schedule drops before a step."""
        for source, held in step.drop:
            self.ram.trim(source, held.low, held.high)
            self.vram[step.device].trim(source, 0, held.vram)

    def available(self, step: Step, task: ChunkTask) -> bool:
        """Return whether all slots that a task needs are free."""
        separate, sources = self._separate(task), self._sources(step, task)
        ram, vram = self.ram, self.vram[task.device]
        out = int(task.last and task.operation.kind is not Kind.COPY)
        uploads = [source for source in sources if separate and vram.find(source, task.chunk) is None]
        reads = [source for source in (uploads if separate else sources) if ram.find(source, task.chunk) is None]
        return ram.has_free(len(reads) + out) and (not separate or vram.has_free(len(uploads) + out))

    def take(self, step: Step, task: ChunkTask) -> list[ReadTask]:
        """Take the slots of a task, and return the chunks that must be read for it."""
        separate = self._separate(task)
        ram, vram = self.ram, self.vram[task.device]
        reads = []
        for place, source, held in zip(step.places, self._sources(step, task), step.keep, strict=True):
            on_device = vram.find(source, task.chunk) if separate else None
            if on_device is None:
                offset, nbytes = self._extent(task, place)
                host = ram.find(source, task.chunk)
                if host is None:
                    host = ram.load(source, task.chunk, nbytes)
                    reads.append(ReadTask(host, source.read, offset, nbytes))
                host.acquire(pinned=held.low <= task.chunk < held.high)
                task.wait_for(host)
                task.hosts.append(host)
                if separate:
                    on_device = vram.load(source, task.chunk, nbytes)
                    task.uploads.append((host, on_device))
                else:
                    task.inputs.append(host)
            else:
                task.wait_for(on_device)
            if on_device is not None:
                on_device.acquire(pinned=task.chunk < held.vram)
                task.inputs.append(on_device)
        if task.last:
            self._take_output(task, separate=separate)
        return reads

    def _take_output(self, task: ChunkTask, *, separate: bool) -> None:
        _, size = self._schedule.span(self._graph, task.node, task.chunk)
        task.out_nbytes = size * output_width(self._graph, task.node)
        if task.operation.kind is not Kind.COPY:
            task.out = self.ram.take()
            if separate:
                task.out_device = self.vram[task.device].take()

    def release_hosts(self, task: ChunkTask) -> None:
        """Release the source chunks of a task in RAM."""
        for cached in task.hosts:
            self.ram.release(cached)
        task.hosts = []

    def release_device(self, task: ChunkTask) -> None:
        """Release the source chunks of a task on its device, and free the slot of its output there."""
        for cached in task.inputs:
            self.vram[task.device].release(cached)
        if task.out_device >= 0:
            self.vram[task.device].free(task.out_device)

    def free_output(self, task: ChunkTask) -> None:
        """Free the slot of a task's output in RAM."""
        if task.out >= 0:
            self.ram.free(task.out)

    def _separate(self, task: ChunkTask) -> bool:
        return self._devices[task.device].separate and task.operation.kind is Kind.MERGE

    def _sources(self, step: Step, task: ChunkTask) -> tuple[ChunkedRead, ...]:
        schedule = self._schedule
        return chunked_sources(self._graph, task.node, schedule.chunk_elements[task.node], schedule.slot_bytes)

    def _extent(self, task: ChunkTask, place: int) -> tuple[int, int]:
        """Return the offset of a source's chunk in its file and the size of the chunk, in bytes."""
        start, size = self._schedule.span(self._graph, task.node, task.chunk)
        ((offset, nbytes),) = extent(self._graph, task.node, place, start, size)
        return self._graph.reads[self._graph.node_sources[task.node][place]].offset + offset, nbytes
