"""The arenas: memory cut into slots of one size, which hold all tensor bytes that the engine works on.

All slots of an arena have the same size, so a freed slot fits any other use: there is no fragmentation, and the run
takes the slots that the schedule's simulation took.
"""

from __future__ import annotations

import errno
import math
import mmap
import time
from collections import deque
from collections.abc import Callable

from ...errors import BudgetError

MARGIN_BYTES = 2 << 20
"""Distance from the limit at which slots are withheld, in bytes: threads allocate while a measurement is compared."""
MEASURE_SECONDS = 0.02
"""Minimum time in seconds between two measurements of the resident memory, each of which is a system call."""


class MemoryWatch:
    """Says whether the process may use more memory. Not locked: the executor holds its lock.

    The plan counts all memory, so the answer is normally yes. If something takes more than planned (a library, malloc's
    fragmentation), fewer slots are used, and the process stays within its budget.

    Args:
        limit: limit of the process's resident memory in bytes.
        resident: function that measures the resident memory in bytes; None to never withhold a slot.
        interval: minimum time in seconds between two measurements.
    """

    def __init__(
        self, limit: int = 0, resident: Callable[[], int] | None = None, interval: float = MEASURE_SECONDS
    ) -> None:
        self._limit = limit
        self._resident = resident
        self._interval = interval
        self._measured = 0
        self._next = -math.inf  # time of the next measurement
        self._granted = 0  # bytes that were granted since the last measurement, and may not be resident yet

    def has_room(self, nbytes: int) -> bool:
        """Return whether `nbytes` more bytes of resident memory keep a margin from the limit."""
        if self._resident is None:
            return True
        now = time.monotonic()
        if now >= self._next:
            self._measured, self._granted = self._resident(), 0
            self._next = now + self._interval
        return self._measured + self._granted + nbytes + MARGIN_BYTES <= self._limit

    def grant(self, nbytes: int) -> None:
        """Count bytes that are about to become resident."""
        self._granted += nbytes


class Slots:
    """The free slots of one arena.

    A slot is *fresh* until it is taken for the first time: its pages take no memory yet. Fresh slots are taken first,
    then the slot that has been free for longest, so all of the arena comes into use. When memory runs short, fresh
    slots beyond the minimum are withheld. Not locked: the owner takes and frees slots under its own lock.

    Args:
        name: name of the memory, for errors.
        count: number of slots.
        slot_bytes: size of a slot in bytes.
        minimum: number of slots that are never withheld, with which every step can be executed.
        watch: says whether a fresh slot may be taken; None to withhold none.
        discard: function that returns the pages of a free slot to the system, so it is fresh again; None to keep them.

    Attributes:
        peak: highest number of slots taken at one time.
    """

    def __init__(
        self,
        name: str,
        count: int,
        slot_bytes: int,
        *,
        minimum: int | None = None,
        watch: MemoryWatch | None = None,
        discard: Callable[[int], None] | None = None,
    ) -> None:
        self.name = name
        self.count = count
        self.slot_bytes = slot_bytes
        self.peak = 0
        self._minimum = count if minimum is None else minimum
        self._watch = watch or MemoryWatch()
        self._discard = discard
        self._fresh = deque(range(count))
        self._used: deque[int] = deque()  # free slots with pages

    @property
    def free_slots(self) -> int:
        """Number of free slots, those that are withheld included."""
        return len(self._used) + len(self._fresh)

    def has_free(self, number: int) -> bool:
        """Return whether a number of slots can be taken."""
        fresh = number - len(self._used)
        return fresh <= 0 or (fresh <= len(self._fresh) and self._has_memory(fresh))

    def _has_memory(self, fresh: int) -> bool:
        """Return whether a number of fresh slots may be taken: they belong to the minimum, or there is memory."""
        in_use = self.count - len(self._fresh)
        return in_use + fresh <= self._minimum or self._watch.has_room(fresh * self.slot_bytes)

    def take(self) -> int:
        """Take a free slot and return its number.

        Raises:
            BudgetError: if no slot is free.
        """
        if self._fresh and (not self._used or self._has_memory(1)):
            slot = self._fresh.popleft()
            self._watch.grant(self.slot_bytes)
        elif self._used:
            slot = self._used.popleft()
        else:
            raise BudgetError(
                f"cannot take a slot of {self.slot_bytes} bytes of {self.name}: all {self.count} slots are taken; the "
                "plan allows no more, so this is a bug in mergeloom: please report it"
            )
        self.peak = max(self.peak, self.count - self.free_slots)
        return slot

    def free(self, slot: int) -> None:
        """Make a slot free again."""
        beyond = self.count - len(self._fresh) > self._minimum
        if self._discard is not None and beyond and not self._watch.has_room(0):
            self._discard(slot)
            self._fresh.append(slot)
        else:
            self._used.append(slot)


def take_memory(nbytes: int) -> mmap.mmap:
    """Map private memory, in huge pages if the system has them.

    Buffers that are read and written over and over would otherwise be spread over more small pages than a core's
    address cache (TLB) holds.
    """
    # private, since huge pages are for private memory
    try:
        memory = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError(f"cannot allocate {nbytes} bytes") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class HostArena:
    """One anonymous mapping, cut into slots. A page uses memory from its first access on.

    Args:
        count: number of slots.
        slot_bytes: size of a slot in bytes, a multiple of 4096.
    """

    def __init__(self, count: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self._map = take_memory(count * slot_bytes)
        self.memory = memoryview(self._map)

    def view(self, slot: int, nbytes: int) -> memoryview:
        """Return a view of the first `nbytes` bytes of a slot."""
        start = slot * self.slot_bytes
        return self.memory[start : start + nbytes]

    def discard(self, slot: int) -> None:
        """Return the pages of a slot to the system; its bytes are lost."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, slot * self.slot_bytes, self.slot_bytes)

    def close(self) -> None:
        """Unmap the memory. Views that are still in use keep the addresses, but not the bytes."""
        self.memory.release()
        try:
            self._map.close()
        except BufferError:  # a view is still in use, such as one in the traceback of an error
            if hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)
