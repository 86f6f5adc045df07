"""The buffers of threads that work outside the lanes: they check, copy and digest. The ledger accounts for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..execute.ledger import Ledger
from .transfers import BUFFER_BYTES


@dataclass(frozen=True, slots=True)
class ThreadBuffers:
    """Buffers for some threads, each reserved in a ledger before it is allocated.

    Args:
        name: what the buffers are for, in the plural, such as ``check buffers``.
        threads: number of threads.
        nbytes: size of each buffer in bytes.
        ledger: ledger in which they are reserved; None outside a merge.
    """

    name: str
    threads: int
    nbytes: int = BUFFER_BYTES
    ledger: Ledger | None = None

    @contextmanager
    def take(self, nbytes: int) -> Iterator[memoryview]:
        """A buffer of `nbytes`, or of the size of each buffer if that is less, until the end of the block.

        Raises:
            BudgetError: if the ledger's limit would be exceeded.
        """
        size = min(self.nbytes, nbytes)
        if self.ledger is None:
            yield memoryview(bytearray(size))
            return
        with self.ledger.reserve(self.name, size):
            yield memoryview(bytearray(size))


def buffers_within(ledger: Ledger, name: str, memory: int, threads: int, each: int) -> ThreadBuffers:
    """Return buffers that fit into a memory: for fewer threads if need be, and smaller ones for a single thread.

    Args:
        ledger: ledger in which they are reserved.
        name: what the buffers are for.
        memory: size of the memory in bytes.
        threads: wanted number of threads.
        each: number of buffers that a thread holds at one time.
    """
    threads = max(1, min(threads, memory // (each * BUFFER_BYTES)))
    return ThreadBuffers(name, threads, max(1, min(BUFFER_BYTES, memory // (threads * each))), ledger)
