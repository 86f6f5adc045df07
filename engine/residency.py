"""Which chunks of which sources lie in the slots of one memory, who uses them, and which the schedule keeps there."""

from __future__ import annotations

from typing import Any

from .arena import Ledger, Slots

Key = tuple[int, int, int]
"""A chunk: the read's number, the elements of its chunks, the chunk's number."""


class Resident:
    """One chunk of one read in a slot.

    Attributes:
        key: which chunk.
        slot: where it lies.
        nbytes: its size.
        users: items in flight that need it.
        pinned: whether the schedule keeps it when no item does.
        ready: whether its bytes are there.
        waiting: the items to tell when they are.
    """

    __slots__ = ("key", "nbytes", "pinned", "ready", "slot", "users", "waiting")

    def __init__(self, key: Key, slot: int, nbytes: int) -> None:
        self.key = key
        self.slot = slot
        self.nbytes = nbytes
        self.users = 0
        self.pinned = False
        self.ready = False
        self.waiting: list[Any] = []

    def hold(self, *, pinned: bool) -> None:
        """One more item needs it; after that item it is kept where `pinned`."""
        self.users += 1
        self.pinned = pinned


class Memory:
    """The slots of one memory, and the chunks in them. Not locked: the executor calls it under its own lock."""

    def __init__(self, ledger: Ledger, name: str, slots: int, slot_bytes: int) -> None:
        self._slots = Slots(ledger, name, slots, slot_bytes)
        self._residents: dict[Key, Resident] = {}

    @property
    def free(self) -> int:
        """How many slots are free."""
        return self._slots.free

    def take(self) -> int:
        """A free slot, for an output."""
        return self._slots.take()

    def give_back(self, slot: int) -> None:
        """An output's slot is free again."""
        self._slots.give_back(slot)

    def find(self, key: Key) -> Resident | None:
        """The chunk, where the schedule keeps it here; one that is merely still in use is read again, as foretold."""
        resident = self._residents.get(key)
        return resident if resident is not None and resident.pinned else None

    def load(self, key: Key, nbytes: int) -> Resident:
        """A slot for a chunk that is about to be read or uploaded."""
        resident = self._residents[key] = Resident(key, self._slots.take(), nbytes)
        return resident

    def release(self, resident: Resident) -> None:
        """One item less needs it."""
        resident.users -= 1
        self._free_if_unused(resident)

    def keep_only(self, read: int, low: int, high: int) -> None:
        """The schedule keeps only the chunks [low, high) of a read from now on."""
        for resident in [found for key, found in self._residents.items() if key[0] == read]:
            if not low <= resident.key[2] < high and resident.pinned:
                resident.pinned = False
                self._free_if_unused(resident)

    def _free_if_unused(self, resident: Resident) -> None:
        if resident.users == 0 and not resident.pinned:
            if self._residents.get(resident.key) is resident:
                del self._residents[resident.key]
            self._slots.give_back(resident.slot)
