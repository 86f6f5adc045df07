"""The byte ledger, and the arenas of equal slots that everything the engine holds is carved from.

Memory is reserved in the ledger before it exists. An arena's slots are all of one size, so that giving one back always
makes room for any other use: there is no fragmentation, and what the schedule has simulated is what happens.
"""

from __future__ import annotations

import errno
import mmap
import threading
from collections import deque
from dataclasses import dataclass

from ...errors import BudgetError


@dataclass(slots=True)
class TensorUsage:
    """What one part of the engine may hold and holds, in bytes."""

    limit: int
    held: int = 0
    peak: int = 0


class Ledger:
    """Every byte that the engine owns, by account. Reserving beyond an account's limit is a bug, and says so."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._accounts: dict[str, TensorUsage] = {}

    def open(self, name: str, limit: int) -> None:
        """Open an account that may hold `limit` bytes."""
        with self._lock:
            if name in self._accounts:
                raise ValueError(f"account {name!r} is open already")
            self._accounts[name] = TensorUsage(limit)

    def reserve(self, name: str, nbytes: int) -> None:
        """Reserve bytes before they are used. Raises BudgetError with what was asked, held and allowed."""
        with self._lock:
            account = self._accounts[name]
            if account.held + nbytes > account.limit:
                raise BudgetError(
                    f"{name}: {nbytes} bytes were asked for with {account.held} of {account.limit} held; "
                    "the schedule promised less: please report this"
                )
            account.held += nbytes
            account.peak = max(account.peak, account.held)

    def release(self, name: str, nbytes: int) -> None:
        """Give bytes back."""
        with self._lock:
            account = self._accounts[name]
            if nbytes > account.held:
                raise ValueError(f"{name}: {nbytes} bytes given back with {account.held} held")
            account.held -= nbytes

    def peak(self, name: str) -> int:
        """The most that an account has held, in bytes."""
        return self._accounts[name].peak

    def held(self, name: str) -> int:
        """What an account holds now, in bytes."""
        return self._accounts[name].held


class Slots:
    """The free slots of one arena; the one free for longest is taken first, so that all of the arena comes into use.

    Not locked: its owner takes and gives back under a lock of its own.
    """

    def __init__(self, ledger: Ledger, name: str, count: int, slot_bytes: int) -> None:
        self._ledger = ledger
        self._name = name
        self._slot_bytes = slot_bytes
        self._free = deque(range(count))
        ledger.open(name, count * slot_bytes)

    @property
    def free_slots(self) -> int:
        """How many slots are free."""
        return len(self._free)

    def take(self) -> int:
        """A free slot's number; there must be one."""
        self._ledger.reserve(self._name, self._slot_bytes)
        return self._free.popleft()

    def free(self, slot: int) -> None:
        """Make a slot free again."""
        self._ledger.release(self._name, self._slot_bytes)
        self._free.append(slot)


def take_memory(nbytes: int) -> mmap.mmap:
    """Private memory in huge pages, where the system has them.

    What is read and written over and over is scattered over thousands of small pages otherwise, which a core can't
    keep the addresses of.
    """
    # private: huge pages are for private memory, and a merge that forks nothing needs no other
    try:
        memory = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError(f"{nbytes} bytes could not be had") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class HostArena:
    """One anonymous mapping, cut into slots. A page of it costs memory from its first use on.

    Args:
        count: of slots.
        slot_bytes: of each; a multiple of 4096.
    """

    def __init__(self, count: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self._map = take_memory(count * slot_bytes)
        self.memory = memoryview(self._map)

    def view(self, slot: int, nbytes: int) -> memoryview:
        """The first `nbytes` bytes of a slot."""
        start = slot * self.slot_bytes
        return self.memory[start : start + nbytes]

    def close(self) -> None:
        """Give the memory back. Views of it that are still alive keep it."""
        self.memory.release()
        try:
            self._map.close()
        except BufferError:  # a torch view is alive; the mapping goes with it
            return
