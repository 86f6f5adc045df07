"""The ledger: every buffer that mergeloom owns is reserved in it before it is allocated."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType

from ...errors import BudgetError
from ...io.sizes import format_size

RAM = "RAM"
"""Name of the host's memory in a ledger. A device's memory has the device's name."""


@dataclass(slots=True)
class Account:
    """The limit and the reservations of one memory.

    Args:
        limit: bytes that may be reserved.
        held: bytes that are reserved, by the name of the reservation.
        peak: highest number of bytes reserved at one time.
    """

    limit: int = 0
    held: dict[str, int] = field(default_factory=dict)
    peak: int = 0

    @property
    def total(self) -> int:
        """Bytes that are reserved, under all names."""
        return sum(self.held.values())


class Reservation:
    """Bytes of one memory that are reserved until `release`, or until the end of a ``with`` block."""

    def __init__(self, ledger: Ledger, name: str, nbytes: int, memory: str) -> None:
        self.name = name
        self.nbytes = nbytes
        self.memory = memory
        self._ledger = ledger
        self._released = False

    def release(self) -> None:
        """Return the bytes to the ledger.

        Raises:
            ValueError: if they were returned before.
        """
        if self._released:
            raise ValueError(f"reservation {self.name!r} of {self.nbytes} bytes of {self.memory} is released twice")
        self._released = True
        self._ledger.release(self)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Ledger:
    """Accounts for every buffer that mergeloom owns, and refuses a buffer that the plan has no memory for.

        with ledger.allow(plan_bytes), ledger.reserve("copy buffers", nbytes):
            buffer = bytearray(nbytes)

    The limit of a memory is the sum of the figures that the plan allows; it is 0 before the first `allow`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._accounts: dict[str, Account] = {}

    @contextlib.contextmanager
    def allow(self, nbytes: int, memory: str = RAM) -> Iterator[None]:
        """Raise the limit of a memory by `nbytes`, a figure of the plan, for the duration of a ``with`` block."""
        with self._lock:
            self._accounts.setdefault(memory, Account()).limit += nbytes
        try:
            yield
        finally:
            with self._lock:
                self._accounts[memory].limit -= nbytes

    def reserve(self, name: str, nbytes: int, memory: str = RAM) -> Reservation:
        """Reserve bytes for a buffer that is about to be allocated.

        Args:
            name: description of the buffer, for errors, such as ``copy buffers``.
            nbytes: size of the buffer in bytes.
            memory: name of the memory.

        Raises:
            BudgetError: if the limit would be exceeded, with the request, the reservations and the limit.
        """
        with self._lock:
            account = self._accounts.setdefault(memory, Account())
            if account.total + nbytes > account.limit:
                held = ", ".join(f"{name} {format_size(size)}" for name, size in account.held.items()) or "nothing"
                raise BudgetError(
                    f"cannot reserve {nbytes} bytes of {memory} for {name}: {account.total} of {account.limit} bytes "
                    f"are reserved ({held}); the plan allows no more, so this is a bug in mergeloom: please report it"
                )
            account.held[name] = account.held.get(name, 0) + nbytes
            account.peak = max(account.peak, account.total)
        return Reservation(self, name, nbytes, memory)

    def release(self, reservation: Reservation) -> None:
        """Return the bytes of a reservation; called by `Reservation.release`."""
        with self._lock:
            held = self._accounts[reservation.memory].held
            left = held.pop(reservation.name, 0) - reservation.nbytes
            if left:
                held[reservation.name] = left

    def limit(self, memory: str = RAM) -> int:
        """Return the bytes of a memory that may be reserved."""
        with self._lock:
            return self._accounts.get(memory, Account()).limit

    def held(self, memory: str = RAM) -> int:
        """Return the bytes of a memory that are reserved."""
        with self._lock:
            return self._accounts.get(memory, Account()).total

    def peak(self, memory: str = RAM) -> int:
        """Return the highest number of bytes of a memory that were reserved at one time."""
        with self._lock:
            return self._accounts.get(memory, Account()).peak
