"""Simulates one order of the nodes in slots: the bytes read, the chunks kept in the cache, and the peak memory.

A chunk that is needed again stays in its slot if there is room. If there is not, the chunks whose next use is furthest
away are dropped and read again (Belady's rule). Chunks stay in a device's own memory first, then in RAM. The output of
a node that others use stays in RAM until the last of them has used it: no file holds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..graph.extents import bytes_of_chunks, length
from ..graph.graph import Kind, MergeGraph
from .alone import StepsAlone
from .passes import Pass, StepShape, undisturbed
from .simulated_cache import SimulatedCache
from .step_list import NOTHING, CachedRange, StepList
from .tiling import ChunkedRead, chunk_count, chunked_sources

_AT_ONCE = 4096
"""Number of steps that are simulated together if they share nothing: the lists take memory."""


@dataclass(slots=True)
class Simulation:
    """A simulation of one order of the nodes.

    Args:
        graph: graph to schedule.
        chunk_elements: for each node, the elements in a chunk.
        slot: size of a slot in bytes.
        ram_slots: number of slots in RAM.
        vram_slots: number of slots on each device.
        devices: number of the device of each node.
        window: number of slots that the widest node takes for one chunk.
        first: first chunk to write of each node that an earlier run has started.
    """

    graph: MergeGraph
    chunk_elements: list[int]
    slot: int
    ram_slots: int
    vram_slots: tuple[int, ...]
    devices: list[int]
    window: int
    first: Mapping[int, int] = field(default_factory=dict)
    steps: StepList = field(init=False)
    bytes_read: int = 0
    bytes_once: int = 0  # bytes that would be read if RAM held every chunk until its last use
    uploaded: int = 0
    peak: int = 0
    vram_peaks: list[int] = field(default_factory=list)
    max_step_working_set: int = 0  # highest number of slots of one step's sources, cached before or after it
    total_slot_demand: int = 0  # slots that would be taken if none were ever freed
    _cache: SimulatedCache = field(init=False)
    _alone: StepsAlone = field(init=False)
    # slots not used for caching: for the current chunks and, if RAM allows, for those read next
    _reserved: int = field(init=False)
    # positions still to come of the sources that several nodes share, the next one last
    _uses: dict[ChunkedRead, list[int]] = field(default_factory=dict)
    _shapes: dict[tuple[int, int], StepShape] = field(default_factory=dict)  # by class and chunk

    def __post_init__(self) -> None:
        self.steps = StepList(self.graph.places)
        self.vram_peaks = [0] * len(self.vram_slots)
        self._cache = SimulatedCache(len(self.vram_slots))
        self._alone = StepsAlone(self.graph, self.chunk_elements, self.slot)
        self._reserved = self.window * (2 if self.ram_slots >= 4 * self.window else 1)

    @property
    def fits(self) -> bool:
        """Whether the steps fit the slots in RAM. They always do if no node uses another one."""
        return self.peak <= self.ram_slots

    def run(self, order: Sequence[int]) -> None:
        """Simulate the nodes in `order`."""
        shared = self._shared_reads(order)
        alone = self._alone.nodes(shared, self.first)
        for position in range(len(order) - 1, -1, -1):
            for source in () if alone[order[position]] else self._sources(order[position]):
                if source.read < 0 or shared[source.read]:
                    self._uses.setdefault(source, []).append(position)
        unread = dict.fromkeys(self._uses, True)
        flags = bytes(map(alone.__getitem__, order))
        position = 0
        while position < len(order):
            if flags[position] and self._cache.ram <= self.ram_slots - self._reserved:
                end = flags.find(0, position, position + _AT_ONCE)
                nodes = order[position : end if end >= 0 else position + _AT_ONCE]
                self._steps_alone(nodes)
                position += len(nodes)
                continue
            node = order[position]
            sources = self._sources(node)
            shape = self._shape(node, sources)
            for source, nbytes in zip(sources, shape.nbytes, strict=True):
                if source.read < 0 or shared[source.read]:
                    self._uses[source].pop()
                    self.bytes_once += nbytes * (source.read >= 0 and unread[source])
                    unread[source] = False
                else:
                    self.bytes_once += nbytes
            self.total_slot_demand += sum(shape.counts) + shape.count * shape.writes
            for index in range(self.graph.operation(node).passes):
                self._step(position, node, index, sources, shape)
            position += 1

    def _shared_reads(self, order: Sequence[int]) -> bytearray:
        """Return for each read whether several of the nodes use it: 0 or 1. Most models share few reads, if any."""
        seen, shared = bytearray(len(self.graph.reads)), bytearray(len(self.graph.reads))
        for node in order if self.graph.shares_reads else ():
            for read in dict.fromkeys(self.graph.node_sources[node]):
                if read >= 0:
                    shared[read] |= seen[read]
                    seen[read] = 1
        return shared

    def _steps_alone(self, nodes: Sequence[int]) -> None:
        """Simulate the only steps of nodes that find nothing in the cache and leave nothing there."""
        steps, devices = self._alone.steps(nodes), list(map(self.devices.__getitem__, nodes))
        separate = [step.computes and self.vram_slots[device] > 0 for step, device in zip(steps, devices, strict=True)]
        ram = [self._cache.ram + step.slots for step in steps]
        vram = uploaded = [0] * len(steps)
        if any(separate):
            held = map(self._cache.vram.__getitem__, devices)
            vram = [on * (before + step.slots) for on, before, step in zip(separate, held, steps, strict=True)]
            uploaded = [on * step.staged for on, step in zip(separate, steps, strict=True)]
            for device, slots in set(zip(devices, vram, strict=True)):
                self.vram_peaks[device] = max(self.vram_peaks[device], slots)
        counts = Counter(map(id, steps))  # a step is equal for all nodes of a class
        for address, step in dict(zip(map(id, steps), steps, strict=True)).items():
            self.total_slot_demand += step.demand * counts[address]
            self.bytes_read += step.nbytes * counts[address]
            self.bytes_once += step.nbytes * counts[address]
        self.uploaded += sum(uploaded)
        self.peak = max(self.peak, *ram)
        self.steps.extend_alone(nodes, devices, [step.bytes_read for step in steps], uploaded, ram, vram)

    def _sources(self, node: int) -> tuple[ChunkedRead, ...]:
        """Return the distinct sources of a node, cut into its chunks."""
        return chunked_sources(self.graph, node, self.chunk_elements[node], self.slot)

    def _shape(self, node: int, sources: tuple[ChunkedRead, ...]) -> StepShape:
        """Return what the steps of a node need."""
        graph, chunk = self.graph, self.chunk_elements[node]
        key = graph.node_class[node], chunk
        known = self._shapes.get(key)
        if known is None:
            places = graph.places(node)
            count = chunk_count(graph, node, chunk)
            known = self._shapes[key] = StepShape(
                count,
                tuple([count if source.chunk_length else min(count, 1) for source in sources]),
                (graph.operation(node).kind is not Kind.COPY) * len(graph.results(node)),
                tuple(self._size(node, place, source, 0, count) for place, source in zip(places, sources, strict=True)),
                CachedRange(0, 0, count),
            )
        return known

    def _size(self, node: int, place: int, source: ChunkedRead, begin: int, end: int, *, zeros: bool = False) -> int:
        """Return the bytes of the chunks [begin, end) of a node's source: in files, or those of zeros included."""
        chunk = self.chunk_elements[node] if source.chunk_length else length(self.graph, node)
        return bytes_of_chunks(self.graph, node, place, max(1, chunk), begin, end, zeros=zeros)

    def _step(self, position: int, node: int, index: int, sources: tuple[ChunkedRead, ...], shape: StepShape) -> None:
        operation, device = self.graph.operation(node), self.devices[node]
        last = index == operation.passes - 1
        skipped = self.first.get(node, 0)
        first = skipped if last else 0
        separate = self.vram_slots[device] > 0 and operation.kind is Kind.MERGE
        before = [self._cache.take(source) for source in sources]
        drop: list[tuple[ChunkedRead, CachedRange]] = []
        if not separate:  # an operation that computes nothing cannot use chunks on the device
            for number, held in enumerate(before):
                if held.vram:
                    before[number] = CachedRange(0, held.low, held.high)
                    drop.append((sources[number], before[number]))
        next_uses: list[int | None]
        if skipped:
            next_uses = [None] * len(sources)  # its last pass skips chunks that would be kept
        elif last:
            next_uses = [uses[-1] if (uses := self._uses.get(source)) else None for source in sources]
        else:
            next_uses = [position] * len(sources)
        output = ChunkedRead(~node, self.chunk_elements[node])
        needed = self._uses.get(output) if last and self._uses else None
        writes = shape.writes if last else 0
        room, others = self.ram_slots - self._reserved, self._cache.ram
        found = None
        if not separate and not skipped:
            found = undisturbed(shape, before, next_uses, writes, others, room, stays=bool(needed))
        if found is not None and found.ram <= self.ram_slots:
            keep, bytes_read, ram, working_set = found
            uploaded = vram = 0
        else:
            this = Pass(node, device, separate, shape, writes, bool(needed), sources, before, next_uses)
            keep, evicted = self._keep(this, self._keep_on_device(this))
            ram, vram = self._peaks(this, keep)
            while ram > self.ram_slots and (dropped := self._drop_before(this, ram - self.ram_slots)):
                drop.append(dropped)
                keep, more = self._keep(this, self._keep_on_device(this))
                evicted += more
                ram, vram = self._peaks(this, keep)
            drop += evicted
            bytes_read, uploaded = self._bytes_moved(this, first)
            working_set = sum([max(b.high - b.low, k.high - k.low) for b, k in zip(before, keep, strict=True)])
            working_set += shape.count * this.stays
        self.max_step_working_set = max(self.max_step_working_set, working_set)
        for source, held, next_use in zip(sources, keep, next_uses, strict=True):
            if next_use is not None:
                self._cache.put(source, held, device, next_use)
        if needed:
            self._cache.put(output, shape.complete, device, needed[-1])
        self.bytes_read += sum(bytes_read)
        self.uploaded += uploaded
        self.peak = max(self.peak, ram)
        self.vram_peaks[device] = max(self.vram_peaks[device], vram)
        self.steps.append_pass(node, index, first, device, keep, drop, bytes_read, uploaded, ram, vram)

    def _keep_on_device(self, this: Pass) -> list[int]:
        """Return how many chunks of each source stay on the device: those needed next first."""
        keep = [0] * len(this.sources)
        if this.separate:
            room = self.vram_slots[this.device] - self._reserved - self._cache.vram[this.device]
            room -= sum(held.vram for held in this.before)
            for _, number in this.by_next_use():
                before = this.before[number].vram
                keep[number] = before + max(0, min(this.shape.counts[number] - before, room))
                room -= keep[number] - before
        return keep

    def _keep(self, this: Pass, vram: list[int]) -> tuple[list[CachedRange], list[tuple[ChunkedRead, CachedRange]]]:
        """Return the chunks of each source that stay cached, and the other sources that lose chunks for them.

        If RAM cannot hold everything that is needed again, the chunks with the furthest next use go, whether they
        belong to this step's sources or to others.

        Args:
            this: the step.
            vram: for each source, how many chunks stay on the device.
        """
        evicted: list[tuple[ChunkedRead, CachedRange]] = []
        counts, next_uses = this.shape.counts, this.next_uses
        low = [max(kept, held.vram) for kept, held in zip(vram, this.before, strict=True)]
        size = [held.ram for held in this.before]  # a cached chunk stays in its slot until the step has used it
        for number, next_use in enumerate(next_uses):
            if next_use is not None:
                size[number] = max(size[number], counts[number] - low[number])
        output = this.shape.count if this.stays else 0
        excess = self._cache.ram + sum(size) + output - (self.ram_slots - self._reserved)
        candidates = this.by_next_use() if excess > 0 else []
        while excess > 0:
            furthest = self._cache.furthest()
            if furthest is not None and (not candidates or furthest[0] >= candidates[-1][0]):
                source, before = furthest[1], self._cache.ram
                evicted.append((source, self._cache.drop(source, excess)))
                excess -= before - self._cache.ram
            elif candidates:
                _, number = candidates.pop()
                kept = max(this.before[number].ram, size[number] - excess)
                excess -= size[number] - kept
                size[number] = kept
            else:
                break
        keep = []
        for number, next_use in enumerate(next_uses):
            chunks = 0 if next_use is None else min(size[number], counts[number] - low[number])
            if chunks:
                keep.append(CachedRange(vram[number], low[number], low[number] + chunks))
            else:
                keep.append(CachedRange(vram[number]) if vram[number] else NOTHING)
        return keep, evicted

    def _drop_before(self, this: Pass, count: int) -> tuple[ChunkedRead, CachedRange] | None:
        """Drop up to `count` cached chunks of one of a step's sources, which the step reads again; None if it has none.

        The outputs of nodes can take the room that the cached chunks had when they were kept.
        """
        for number, (source, held) in enumerate(zip(this.sources, this.before, strict=True)):
            if held.ram and source.read >= 0:
                this.before[number] = CachedRange(held.vram, held.low, held.high - min(count, held.ram))
                return source, this.before[number]
        return None

    def _bytes_moved(self, this: Pass, first: int) -> tuple[tuple[int, ...], int]:
        """Return the bytes read of each source and the bytes uploaded, by a pass that starts with chunk `first`."""
        node, shape = this.node, this.shape
        if not first and not this.separate and all(held is NOTHING for held in this.before):
            return shape.nbytes, 0
        bytes_read, uploaded = [], 0
        places = self.graph.places(node)
        for number, (place, source, count, held) in enumerate(
            zip(places, this.sources, shape.counts, this.before, strict=True)
        ):
            if not first and not this.separate and (held is NOTHING or held.ram == count):
                bytes_read.append(shape.nbytes[number] if held is NOTHING else 0)
                continue
            begin = first if source.chunk_length else int(first >= shape.count)
            begin = max(begin, held.vram)
            needed = self._size(node, place, source, begin, count)
            uploaded += self._size(node, place, source, begin, count, zeros=True) if this.separate else 0
            in_ram = self._size(node, place, source, max(begin, held.low), held.high)
            bytes_read.append(needed - in_ram)
        return tuple(bytes_read), uploaded

    def _peaks(self, this: Pass, keep: Sequence[CachedRange]) -> tuple[int, int]:
        """Return the peak number of slots held during a step: in RAM, and on the device."""
        ram_others = self._cache.ram
        vram_others = self._cache.vram[this.device] if this.separate else 0
        count = this.shape.count
        if count == 0:
            return ram_others, vram_others
        points = {0, count - 1}
        for held in (*this.before, *keep):
            if held is not NOTHING:
                points |= {held.vram - 1, held.vram, held.low, held.high - 1, held.high}
        ram = vram = 0
        for chunk in points:
            if not 0 <= chunk < count:
                continue
            ram_now = ram_others + this.writes + (chunk if this.stays else 0)
            vram_now = vram_others + this.writes
            for source, old, new in zip(this.sources, this.before, keep, strict=True):
                if not source.chunk_length:  # one chunk, held by the step from its start to its end
                    ram_now += new.ram if this.separate and chunk else not old.vram
                    vram_now += 1
                    continue
                on_device = chunk < old.vram
                in_ram = not on_device and old.low <= chunk < old.high
                if old is not NOTHING:
                    ram_now += max(0, old.high - max(old.low, chunk))
                if new is not NOTHING:
                    ram_now += max(0, min(new.high, chunk) - new.low)
                ram_now += not on_device and not in_ram
                vram_now += max(0, old.vram - chunk) + min(chunk, new.vram) + (not on_device)
            ram = max(ram, ram_now)
            vram = max(vram, vram_now) if this.separate else 0
        return ram, vram
