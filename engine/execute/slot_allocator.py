"""Slots of tasks: a task takes all its slots before any of its work starts, and frees them as the work completes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..graph.extents import ByteRange, extent, length, made
from ..graph.graph import Kind, MergeGraph
from ..schedule.schedule import Schedule
from ..schedule.step_list import Step
from ..schedule.tiling import ChunkedRead, chunked_sources
from .arena import MemoryWatch
from .cache import ChunkCache
from .devices.base import Device
from .ledger import RAM
from .tasks import ChunkTask, OutputChunk, ReadTask


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
        self._destinations = graph.destinations()
        self._kept = _kept_outputs(graph, schedule)
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
        separate, sources = self._separate(task), self._sources(task)
        ram, vram = self.ram, self.vram[task.device]
        out = len(self._graph.results(task.node)) if task.last and task.operation.kind is not Kind.COPY else 0
        uploads = reads = 0
        for source in sources:
            chunk = _chunk_of(source, task)
            if separate and vram.find(source, chunk) is not None:
                continue
            uploads += separate
            reads += ram.find(source, chunk) is None
        return ram.has_free(reads + out) and (not separate or vram.has_free(uploads + out))

    def take(self, step: Step, task: ChunkTask) -> list[ReadTask]:
        """Take the slots of a task, and return the chunks that must be read for it."""
        separate = self._separate(task)
        ram, vram = self.ram, self.vram[task.device]
        ended = task.chunk == self._schedule.chunks(self._graph, task.node) - 1
        reads = []
        for place, source, held in zip(step.places, self._sources(task), step.keep, strict=True):
            chunk = _chunk_of(source, task)
            stays = not source.chunk_length and not ended  # the next tasks of the step use the same chunk
            on_device = vram.find(source, chunk) if separate else None
            if on_device is None:
                host = ram.find(source, chunk)
                if host is None:
                    ranges = self._ranges(task, place, source)
                    host = ram.load(source, chunk, sum(each.nbytes for each in ranges))
                    reads.append(ReadTask(host, source.read, ranges))
                host.acquire(pinned=held.low <= chunk < held.high or (stays and not separate))
                task.wait_for(host)
                task.hosts.append(host)
                if separate:
                    on_device = vram.load(source, chunk, host.nbytes)
                    task.uploads.append((host, on_device))
                else:
                    task.inputs.append(host)
            else:
                task.wait_for(on_device)
            if on_device is not None:
                on_device.acquire(pinned=chunk < held.vram or stays)
                task.inputs.append(on_device)
        if task.last:
            self._take_outputs(task, separate=separate)
        return reads

    def _take_outputs(self, task: ChunkTask, *, separate: bool) -> None:
        graph = self._graph
        first, size = self._schedule.span(graph, task.node, task.chunk)
        task.written = bool(self._destinations[task.node]) and task.node not in self._schedule.again
        outputs = []
        for node in graph.results(task.node):
            nbytes = made(graph, node, first, size).nbytes
            if task.operation.kind is Kind.COPY:
                slot = task.inputs[0].slot
            elif node in self._kept:
                source = ChunkedRead(~node, self._schedule.chunk_elements[node])
                task.kept = self.ram.load(source, task.chunk, nbytes)
                task.kept.acquire(pinned=True)
                slot = task.kept.slot
            else:
                slot = self.ram.take()
            outputs.append(OutputChunk(node, slot, self.vram[task.device].take() if separate else -1, nbytes))
        task.outputs = tuple(outputs)

    def release_hosts(self, task: ChunkTask) -> None:
        """Release the source chunks of a task in RAM."""
        for cached in task.hosts:
            self.ram.release(cached)
        task.hosts = []

    def release_device(self, task: ChunkTask) -> None:
        """Release the source chunks of a task on its device, and free the slots of its outputs there."""
        for cached in task.inputs:
            self.vram[task.device].release(cached)
        for output in task.outputs:
            self.vram[task.device].free(output.on_device)

    def free_outputs(self, task: ChunkTask) -> None:
        """Free the slots of a task's outputs in RAM, but for the chunk that other nodes use."""
        if task.operation.kind is Kind.COPY:
            return
        for output in task.outputs:
            if task.kept is not None and output.slot == task.kept.slot:
                self.ram.release(task.kept)
            else:
                self.ram.free(output.slot)

    def _separate(self, task: ChunkTask) -> bool:
        return self._devices[task.device].separate and task.operation.kind is Kind.MERGE

    def _sources(self, task: ChunkTask) -> tuple[ChunkedRead, ...]:
        schedule = self._schedule
        return chunked_sources(self._graph, task.node, schedule.chunk_elements[task.node], schedule.slot_bytes)

    def _ranges(self, task: ChunkTask, place: int, source: ChunkedRead) -> list[ByteRange]:
        """Return the ranges of a source tensor that a task stages.

        Raises:
            RuntimeError: if the source is a node's output, which must be cached.
        """
        if source.read < 0:
            raise RuntimeError(f"chunk {task.chunk} of node {~source.read} is used, but is not cached")
        if source.chunk_length:
            first, count = self._schedule.span(self._graph, task.node, task.chunk)
        else:
            first, count = 0, length(self._graph, task.node)
        return extent(self._graph, task.node, place, first, count)


def _chunk_of(source: ChunkedRead, task: ChunkTask) -> int:
    """Return the number of the chunk of a source that a task uses."""
    return task.chunk if source.chunk_length else 0


def _kept_outputs(graph: MergeGraph, schedule: Schedule) -> set[int]:
    """Return the nodes whose output is used by others that the schedule has: an earlier run may have finished some."""
    users = graph.users()
    scheduled = schedule.steps.nodes if users else set()
    return {node for node in users if not scheduled.isdisjoint(users[node])}
