"""Which chunks of which sources lie in the slots of one memory, who uses them, and which the schedule keeps there."""

from __future__ import annotations

from typing import Any

from ..schedule.tiling import ChunkedRead
from .arena import Ledger, Slots


class CachedChunk:
    """One chunk of one read in a slot.

    Attributes:
        source: the read that it is a chunk of.
        chunk: its number.
        slot: where it lies.
        nbytes: its size.
        users: items in flight that need it.
        pinned: whether the schedule keeps it when no item does.
        freed: whether its slot was given back; the chunk can't be used any more.
        ready: whether its bytes are there.
        waiting: the items to tell when they are.
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
        return f"chunk {self.chunk} of read {self.source.read} in chunks of {self.source.chunk_length}"

    def acquire(self, *, pinned: bool) -> None:
        """One more item needs it; after that item it is kept where `pinned`.

        Raises:
            ValueError: if its slot was given back.
        """
        if self.freed:
            raise ValueError(f"{self} is held after its slot was given back")
        self.users += 1
        self.pinned = pinned


class ChunkCache:
    """The slots of one memory, and the chunks in them. Not locked: the executor calls it under its own lock."""

    def __init__(self, ledger: Ledger, name: str, slots: int, slot_bytes: int) -> None:
        self._slots = Slots(ledger, name, slots, slot_bytes)
        self._residents: dict[ChunkedRead, dict[int, CachedChunk]] = {}
        self._outputs: set[int] = set()

    @property
    def free_slots(self) -> int:
        """How many slots are free."""
        return self._slots.free_slots

    def take(self) -> int:
        """A free slot, for an output."""
        slot = self._slots.take()
        self._outputs.add(slot)
        return slot

    def free(self, slot: int) -> None:
        """An output's slot is free again.

        Raises:
            ValueError: if no output has it: two chunks would share it.
        """
        if slot not in self._outputs:
            raise ValueError(f"slot {slot} is given back, but no output has it")
        self._outputs.remove(slot)
        self._slots.free(slot)

    def find(self, source: ChunkedRead, chunk: int) -> CachedChunk | None:
        """The chunk, where the schedule keeps it here; one that is merely still in use is read again, as planned."""
        resident = self._residents.get(source, {}).get(chunk)
        return resident if resident is not None and resident.pinned else None

    def load(self, source: ChunkedRead, chunk: int, nbytes: int) -> CachedChunk:
        """A slot for a chunk that is about to be read or uploaded.

        Raises:
            ValueError: if the schedule keeps the chunk here: its slot would never be given back.
        """
        if (kept := self.find(source, chunk)) is not None:
            raise ValueError(f"{kept} is loaded although it is kept")
        resident = CachedChunk(source, chunk, self._slots.take(), nbytes)
        self._residents.setdefault(source, {})[chunk] = resident
        return resident

    def release(self, resident: CachedChunk) -> None:
        """One item less needs it.

        Raises:
            ValueError: if no item does.
        """
        if not resident.users:
            raise ValueError(f"{resident} is released without a user")
        resident.users -= 1
        self._free_if_unused(resident)

    def trim(self, source: ChunkedRead, low: int, high: int) -> None:
        """The schedule keeps only the chunks [low, high) of a read from now on."""
        for resident in list(self._residents.get(source, {}).values()):
            if not low <= resident.chunk < high and resident.pinned:
                resident.pinned = False
                self._free_if_unused(resident)

    def _free_if_unused(self, resident: CachedChunk) -> None:
        if resident.users or resident.pinned:
            return
        chunks = self._residents.get(resident.source, {})
        if chunks.get(resident.chunk) is resident:  # and not the same chunk, read again meanwhile
            del chunks[resident.chunk]
            if not chunks:
                del self._residents[resident.source]
        resident.freed = True
        self._slots.free(resident.slot)
