"""The cache of a simulation: which chunks are in which memory, and which one is needed last."""

from __future__ import annotations

import heapq

from .step_list import NOTHING, CachedRange
from .tiling import ChunkedRead

MAX_STALE = 1000
"""Number of stale entries in the heap of a `SimulatedCache` that are removed, if there are more than live ones."""


class SimulatedCache:
    """The chunks that are cached between steps, and the slots that they take.

    Attributes:
        ram: slots taken in RAM.
        vram: slots taken on each device.

    Outputs of nodes are held, too: they are taken by the steps that use them, but `furthest` never names them.
    """

    def __init__(self, devices: int) -> None:
        self.ram = 0
        self.vram = [0] * devices
        self._entries: dict[ChunkedRead, tuple[CachedRange, int, int]] = {}  # with device and next use
        # next uses and sources, negated: the heap has the furthest first; entries of sources taken since are stale
        self._by_use: list[tuple[int, int, int, int]] = []

    def put(self, source: ChunkedRead, held: CachedRange, device: int, next_use: int) -> None:
        """Cache chunks of a source, until a step at position `next_use` takes them."""
        if held.ram or held.vram:
            self._entries[source] = held, device, next_use
            self.ram += held.ram
            self.vram[device] += held.vram
        if held.ram and source.read >= 0:
            heapq.heappush(self._by_use, _entry(next_use, source))
            if len(self._by_use) > 2 * len(self._entries) + MAX_STALE:
                self._remove_stale()

    def _remove_stale(self) -> None:
        """Remove the stale entries of the heap: with room in RAM nothing else does, and every pass adds some."""
        entries = self._entries.items()
        self._by_use = [_entry(use, source) for source, (held, _, use) in entries if held.ram and source.read >= 0]
        heapq.heapify(self._by_use)

    def take(self, source: ChunkedRead) -> CachedRange:
        """Remove a source from the cache; return the chunks that were cached."""
        held, device, _ = self._entries.pop(source, (NOTHING, 0, 0))
        self.ram -= held.ram
        self.vram[device] -= held.vram
        return held

    def furthest(self) -> tuple[int, ChunkedRead] | None:
        """Return the source with chunks in RAM that is needed last, after its next use; None if no chunk is in RAM."""
        while self._by_use:
            next_use, read, chunk_length, access = (-number for number in self._by_use[0])
            source = ChunkedRead(read, chunk_length, access)
            held, _, current = self._entries.get(source, (NOTHING, 0, -1))
            if held.ram and current == next_use:
                return next_use, source
            heapq.heappop(self._by_use)
        return None

    def drop(self, source: ChunkedRead, count: int) -> CachedRange:
        """Drop the last `count` chunks of a source from RAM, or all if it has fewer; return those that stay cached."""
        _, device, next_use = self._entries[source]
        held = self.take(source)
        kept = CachedRange(held.vram, held.low, held.high - min(count, held.ram))
        self.put(source, kept, device, next_use)
        return kept


def _entry(next_use: int, source: ChunkedRead) -> tuple[int, int, int, int]:
    return -next_use, -source.read, -source.chunk_length, -source.access
