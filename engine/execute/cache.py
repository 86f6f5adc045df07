"""The chunk cache of one memory: the slots, the chunks in them, their users, and which chunks the schedule keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..schedule.tiling import ChunkedRead
from .arena import MemoryWatch, Slots


class CachedChunk:
    """One chunk of one read in a slot.

    Attributes:
        source: the read that the chunk belongs to.
        chunk: number of the chunk.
        slot: number of the slot that holds it.
        nbytes: size of the chunk in bytes.
        users: number of tasks in flight that need it.
        pinned: whether the schedule keeps it when no task needs it.
        freed: whether its slot was freed; the chunk can no longer be used.
        ready: whether its bytes have been loaded.
        waiting: tasks to notify once it is ready.
    """

    __slots__ = ("chunk", "freed", "nbytes", "pinned", "ready", "slot", "source", "users", "waiting")

    def __init__(self, source: ChunkedRead, chunk: int, slot: int, nbytes: int) -> None:
        self.source = source
        self.chunk = chunk
        self.slot = slot
        self.nbytes = nbytes
        self.users = 0
        self.pinned = False
        self.freed = False
        self.ready = False
        self.waiting: list[Any] = []

    def __str__(self) -> str:
        return f"chunk {self.chunk} of read {self.source.read} (chunk length {self.source.chunk_length})"

    def acquire(self, *, pinned: bool) -> None:
        """Add a user. Once no task needs the chunk, it stays cached if `pinned`.

        Raises:
            ValueError: if its slot was freed.
        """
        if self.freed:
            raise ValueError(f"{self} is acquired after its slot was freed")
        self.users += 1
        self.pinned = pinned


class ChunkCache:
    """The slots of one memory and the chunks in them. Not locked: the executor calls it under its own lock.

    Args:
        name: name of the memory, for errors.
        slots: number of slots.
        slot_bytes: size of a slot in bytes.
        minimum: number of slots that are never withheld; all if None.
        watch: says whether slots beyond the minimum may be used; None to withhold none.
        discard: function that returns the pages of a free slot to the system.
    """

    def __init__(
        self,
        name: str,
        slots: int,
        slot_bytes: int,
        *,
        minimum: int | None = None,
        watch: MemoryWatch | None = None,
        discard: Callable[[int], None] | None = None,
    ) -> None:
        self._slots = Slots(name, slots, slot_bytes, minimum=minimum, watch=watch, discard=discard)
        self._chunks: dict[ChunkedRead, dict[int, CachedChunk]] = {}
        self._outputs: set[int] = set()

    @property
    def free_slots(self) -> int:
        """Number of free slots."""
        return self._slots.free_slots

    def has_free(self, number: int) -> bool:
        """Return whether a number of slots can be taken now."""
        return self._slots.has_free(number)

    @property
    def peak_bytes(self) -> int:
        """Highest number of bytes in slots that were taken at one time."""
        return self._slots.peak * self._slots.slot_bytes

    def take(self) -> int:
        """Take a free slot for an output chunk and return its number."""
        slot = self._slots.take()
        self._outputs.add(slot)
        return slot

    def free(self, slot: int) -> None:
        """Free the slot of an output chunk.

        Raises:
            ValueError: if the slot does not hold an output chunk: two chunks would share it.
        """
        if slot not in self._outputs:
            raise ValueError(f"slot {slot} is freed, but does not hold an output chunk")
        self._outputs.remove(slot)
        self._slots.free(slot)

    def find(self, source: ChunkedRead, chunk: int) -> CachedChunk | None:
        """Return the chunk if the schedule keeps it here. One that is only in use is read again, as planned."""
        cached = self._chunks.get(source, {}).get(chunk)
        return cached if cached is not None and cached.pinned else None

    def load(self, source: ChunkedRead, chunk: int, nbytes: int) -> CachedChunk:
        """Take a slot for a chunk that is about to be read or uploaded.

        Raises:
            ValueError: if the schedule keeps the chunk here already: that slot would never be freed.
        """
        if (kept := self.find(source, chunk)) is not None:
            raise ValueError(f"{kept} is loaded although it is cached")
        cached = CachedChunk(source, chunk, self._slots.take(), nbytes)
        self._chunks.setdefault(source, {})[chunk] = cached
        return cached

    def release(self, cached: CachedChunk) -> None:
        """Remove a user of a chunk. The slot is freed if that was the last one and the schedule does not keep it.

        Raises:
            ValueError: if the chunk has no user.
        """
        if not cached.users:
            raise ValueError(f"{cached} is released without a user")
        cached.users -= 1
        self._free_if_unused(cached)

    def trim(self, source: ChunkedRead, low: int, high: int) -> None:
        """Keep only the chunks [low, high) of a source from now on."""
        for cached in list(self._chunks.get(source, {}).values()):
            if not low <= cached.chunk < high and cached.pinned:
                cached.pinned = False
                self._free_if_unused(cached)

    def _free_if_unused(self, cached: CachedChunk) -> None:
        if cached.users or cached.pinned:
            return
        chunks = self._chunks.get(cached.source, {})
        if chunks.get(cached.chunk) is cached:  # the same chunk may have been read again into another slot
            del chunks[cached.chunk]
            if not chunks:
                del self._chunks[cached.source]
        cached.freed = True
        self._slots.free(cached.slot)
