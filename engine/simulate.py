"""One order of the nodes gone through in slots: what is read, what stays cached, and what is held at the most.

A chunk that is needed again stays in its slot where there is room; where there isn't, the chunks needed furthest in the
future are dropped and read again (Belady's rule). Where the device has a memory of its own, chunks stay there first,
then in RAM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .graph import Kind, MergeGraph
from .tiling import chunk_count, clusters


@dataclass(slots=True)
class Held:
    """The chunks of one read that are cached: [0, vram) on its device, [low, high) in RAM."""

    vram: int = 0
    low: int = 0
    high: int = 0

    @property
    def ram(self) -> int:
        """How many chunks lie in RAM."""
        return self.high - self.low


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of one node.

    Args:
        node: its number.
        index: which pass, from 0; the last one makes the output.
        first: the first chunk that it goes through; more than 0 where an earlier run wrote the ones before.
        device: the number of the device that computes it.
        sources: the distinct reads of the node.
        keep: for each of them, the chunks that stay cached after the step.
        drop: reads that lose cached chunks before the step, with what they keep.
        bytes_read: tensor bytes read from files during the step.
        uploaded: bytes copied to the device.
        ram: the most slots of RAM held during the step, run serially.
        vram: the same on the step's device.
    """

    node: int
    index: int
    first: int
    device: int
    sources: tuple[int, ...]
    keep: tuple[Held, ...]
    drop: tuple[tuple[int, Held], ...]
    bytes_read: int
    uploaded: int
    ram: int
    vram: int


def orders(graph: MergeGraph) -> list[list[int]]:
    """Orders of the nodes worth simulating: as sources lie on the disk, with their consumers together, as built."""
    files = {file: number for number, file in enumerate(sorted({ref.file for ref in graph.reads}))}

    def place(node: int) -> tuple[int, int]:
        ref = graph.reads[graph.node_sources[node][0]]
        return files[ref.file], ref.offset

    by_place = sorted(graph, key=place)
    if not clusters(graph):
        return [by_place]
    consumers = graph.consumers()
    together: list[int] = []
    seen: set[int] = set()
    for start in by_place:
        stack = [start]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            together.append(node)
            neighbours = {other for read in graph.node_sources[node] for other in consumers[read]} - seen
            stack.extend(sorted(neighbours, key=place, reverse=True))
    return [by_place, together, list(graph)]


@dataclass(slots=True)
class Simulation:
    """One order, gone through in slots."""

    graph: MergeGraph
    chunk_elements: list[int]
    ram_slots: int
    vram_slots: tuple[int, ...]
    devices: list[int]
    window: int
    first: Mapping[int, int] = field(default_factory=dict)  # nodes of which the chunks before this one are written
    steps: list[Step] = field(default_factory=list)
    bytes_read: int = 0
    uploaded: int = 0
    peak: int = 0
    vram_peaks: list[int] = field(default_factory=list)
    resident: int = 0  # the most slots that one step's sources take when all of them are kept
    demand: int = 0  # slots that would be taken if none were ever given back
    _cache: dict[tuple[int, int], Held] = field(default_factory=dict)
    _uses: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def run(self, order: Sequence[int]) -> None:
        """Go through the nodes in `order`."""
        graph = self.graph
        self.vram_peaks = [0] * len(self.vram_slots)
        for position in range(len(order) - 1, -1, -1):
            node = order[position]
            for read in set(graph.node_sources[node]):
                self._uses.setdefault((read, self.chunk_elements[node]), []).append(position)
        for position, node in enumerate(order):
            sources = tuple(dict.fromkeys(graph.node_sources[node]))
            for read in sources:
                self._uses[read, self.chunk_elements[node]].pop()
            passes = graph.operation(node).passes
            for index in range(passes):
                self._step(position, node, index, passes, sources)

    def _next_use(self, read: int, chunk: int, position: int, more_passes: bool) -> float:
        """The position of the next step that needs the chunks of a read; infinite where none does."""
        if more_passes:
            return position
        uses = self._uses[read, chunk]
        return uses[-1] if uses else math.inf

    def _step(self, position: int, node: int, index: int, passes: int, sources: tuple[int, ...]) -> None:
        graph, chunk = self.graph, self.chunk_elements[node]
        count = chunk_count(graph, node, chunk)
        device = self.devices[node]
        separate = self.vram_slots[device] > 0
        out = graph.operation(node).kind is not Kind.COPY and index == passes - 1
        copy = graph.operation(node).kind is not Kind.MERGE
        separate = separate and not copy
        before = [self._cache.pop((read, chunk), Held()) for read in sources]
        if index == 0:
            self.demand += count * (len(sources) + (graph.operation(node).kind is not Kind.COPY))
        last = index == passes - 1
        first = self.first.get(node, 0)
        again = [self._next_use(read, chunk, position, not last) for read in sources]
        if first:
            again = [math.inf] * len(sources)  # its last pass doesn't come by every chunk that would be kept
        if all(math.isinf(use) for use in again) and not self._cache and not any(h.ram or h.vram for h in before):
            keep = [Held() for _ in sources]
            drops: list[tuple[int, Held]] = []
        else:
            keep, drops = self._keep(sources, chunk, count, before, again, device, separate)
            self.resident = max(self.resident, sum(max(b.ram, k.ram) for b, k in zip(before, keep, strict=True)))
        ram, vram = self._peaks(count, before, keep, out, device, separate)
        read_bytes = uploaded = 0
        for read, held in zip(sources, before, strict=True):
            ref = graph.reads[read]
            element = 1 if copy else ref.dtype.bits // 8
            on_device = self._range_bytes(0, held.vram, chunk, ref.nbytes, element)
            in_ram = self._range_bytes(max(held.low, held.vram), held.high, chunk, ref.nbytes, element)
            skipped = self._range_bytes(0, first, chunk, ref.nbytes, element) if last else 0
            read_bytes += ref.nbytes - on_device - in_ram - skipped
            uploaded += (ref.nbytes - on_device - skipped) if separate else 0
        for read, held in zip(sources, keep, strict=True):
            if held.ram or held.vram:
                self._cache[(read, chunk)] = held
        self.bytes_read += read_bytes
        self.uploaded += uploaded
        self.peak = max(self.peak, ram)
        self.vram_peaks[device] = max(self.vram_peaks[device], vram)
        self.steps.append(
            Step(
                node,
                index,
                first if last else 0,
                device,
                sources,
                tuple(keep),
                tuple(drops),
                read_bytes,
                uploaded,
                ram,
                vram,
            )
        )

    @staticmethod
    def _range_bytes(first: int, end: int, chunk: int, nbytes: int, element: int) -> int:
        """The bytes of the chunks [first, end) of a tensor of `nbytes` bytes."""
        return max(0, min(end * chunk * element, nbytes) - min(first * chunk * element, nbytes))

    def _keep(
        self,
        sources: tuple[int, ...],
        chunk: int,
        count: int,
        before: list[Held],
        again: list[float],
        device: int,
        separate: bool,
    ) -> tuple[list[Held], list[tuple[int, Held]]]:
        """What stays cached after a step, nearest use first; and what others lose before it."""
        depth = 2 if self.ram_slots >= 4 * self.window else 1
        ram_left = self.ram_slots - depth * self.window - sum(held.ram for held in before)
        others = [
            (self._next_use(read, own_chunk, 0, False), read, own_chunk, held)
            for (read, own_chunk), held in self._cache.items()
        ]
        mine = [(use, number) for number, use in enumerate(again)]
        keep = [Held() for _ in sources]
        if separate:
            vram_left = self.vram_slots[device] - depth * self.window - sum(held.vram for held in before)
            vram_left -= sum(held.vram for _, read, _, held in others if self._home(read) == device)
            for use, number in sorted(mine):
                if math.isinf(use):
                    continue
                extra = max(0, min(count - before[number].vram, vram_left))
                keep[number].vram = before[number].vram + extra
                vram_left -= extra
        dropped: list[tuple[int, Held]] = []
        ranked: list[tuple[float, int, int, int]] = [(use, 0, number, 0) for use, number in mine]
        ranked += [(use, 1, read, own_chunk) for use, read, own_chunk, _ in others]
        for use, foreign, number, own_chunk in sorted(ranked):
            if foreign:
                held = self._cache[(number, own_chunk)]
                kept = max(0, min(held.ram, ram_left))
                ram_left -= kept
                if kept < held.ram:
                    smaller = Held(held.vram, held.low, held.low + kept)
                    dropped.append((number, smaller))
                    if smaller.vram or smaller.ram:
                        self._cache[(number, own_chunk)] = smaller
                    else:
                        del self._cache[(number, own_chunk)]
                continue
            if math.isinf(use):
                continue
            low = max(keep[number].vram, before[number].vram)
            wanted = count - low
            extra = max(0, min(wanted - before[number].ram, ram_left))
            ram_left -= extra
            size = min(wanted, before[number].ram + extra)
            keep[number].low, keep[number].high = (low, low + size) if size > 0 else (0, 0)
        return keep, dropped

    def _home(self, read: int) -> int:
        """The device of the nodes that use a read (nodes that share one are on one device)."""
        for step in reversed(self.steps):
            if read in step.sources:
                return step.device
        return 0

    def _peaks(
        self, count: int, before: list[Held], keep: list[Held], out: bool, device: int, separate: bool
    ) -> tuple[int, int]:
        """The most slots held during a step: of RAM, and on the device."""
        ram_others = sum(held.ram for held in self._cache.values())
        vram_others = (
            sum(held.vram for (read, _), held in self._cache.items() if held.vram and self._home(read) == device)
            if separate
            else 0
        )
        if count == 0:
            return ram_others, vram_others
        points = {0, count - 1}
        for held in (*before, *keep):
            points |= {p for p in (held.vram - 1, held.vram, held.low, held.high - 1, held.high) if 0 <= p < count}
        ram = vram = 0
        for chunk in points:
            ram_now = ram_others + out
            vram_now = vram_others + (out if separate else 0)
            for old, new in zip(before, keep, strict=True):
                on_device = chunk < old.vram
                in_ram = not on_device and old.low <= chunk < old.high
                ram_now += max(0, old.high - max(old.low, chunk)) + max(0, min(new.high, chunk) - new.low)
                ram_now += not on_device and not in_ram
                if separate:
                    vram_now += max(0, old.vram - chunk) + min(chunk, new.vram) + (not on_device)
            ram, vram = max(ram, ram_now), max(vram, vram_now)
        return ram, vram
