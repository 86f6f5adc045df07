"""The arenas: memory cut into slots of one size, which hold all tensor bytes that the engine works on.

All slots of an arena have the same size, so a freed slot fits any other use: there is no fragmentation, and the run
takes the slots that the schedule's simulation took.
"""

from __future__ import annotations

import errno
import mmap
from collections import deque

from ...errors import BudgetError


class Slots:
    """The free slots of one arena.

    The slot that has been free for longest is taken first, so all of the arena comes into use. Not locked: the owner
    takes and frees slots under its own lock.

    Args:
        name: name of the memory, for errors.
        count: number of slots.
        slot_bytes: size of a slot in bytes.

    Attributes:
        peak: highest number of slots taken at one time.
    """

    def __init__(self, name: str, count: int, slot_bytes: int) -> None:
        self.name = name
        self.count = count
        self.slot_bytes = slot_bytes
        self.peak = 0
        self._free = deque(range(count))

    @property
    def free_slots(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def take(self) -> int:
        """Take a free slot and return its number.

        Raises:
            BudgetError: if no slot is free.
        """
        if not self._free:
            raise BudgetError(
                f"cannot take a slot of {self.slot_bytes} bytes of {self.name}: all {self.count} slots are taken; the "
                "plan allows no more, so this is a bug in mergeloom: please report it"
            )
        slot = self._free.popleft()
        self.peak = max(self.peak, self.count - len(self._free))
        return slot

    def free(self, slot: int) -> None:
        """Make a slot free again."""
        self._free.append(slot)


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

    def close(self) -> None:
        """Unmap the memory. Views that are still in use keep it mapped."""
        self.memory.release()
        try:
            self._map.close()
        except BufferError:  # a torch tensor views the mapping; it is unmapped together with the tensor
            return
