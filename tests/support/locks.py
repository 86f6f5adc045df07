"""Locks for tests that refuse to be taken in the wrong order, in place of those of a module."""

from __future__ import annotations

import threading
from types import ModuleType, SimpleNamespace

import pytest

_LOCAL = threading.local()


def held_locks() -> list[RankedLock]:
    """The ranked locks that the current thread holds, in the order in which it took them."""
    if not hasattr(_LOCAL, "held"):
        _LOCAL.held = []
    held: list[RankedLock] = _LOCAL.held
    return held


class RankedLock:
    """A lock that may be taken only by a thread whose ranked locks all have a lower rank.

    Args:
        name: name of the lock in errors.
        rank: rank of the lock; 0 for one that is taken alone.
        nested: list that receives the names of every two locks that a thread holds at the same time.
    """

    def __init__(self, name: str, rank: int, nested: list[tuple[str, str]]) -> None:
        self.name = name
        self.rank = rank
        self._nested = nested
        self._lock = threading.Lock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock, or raise AssertionError if the thread holds another one that it must not hold."""
        held = held_locks()
        for outer in held:
            assert 0 < outer.rank < self.rank, f"lock {self.name} is taken while lock {outer.name} is held"
            self._nested.append((outer.name, self.name))
        taken = self._lock.acquire(blocking, timeout)
        if taken:
            held.append(self)
        return taken

    def release(self) -> None:
        """Release the lock."""
        held_locks().remove(self)
        self._lock.release()

    def _is_owned(self) -> bool:  # for threading.Condition
        return self in held_locks()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()


def rank_locks(
    patch: pytest.MonkeyPatch, module: ModuleType, name: str, rank: int, nested: list[tuple[str, str]]
) -> None:
    """Make every lock that a module creates from now on a RankedLock with this name and rank."""
    names = {**vars(threading), "Lock": lambda: RankedLock(name, rank, nested)}
    patch.setattr(module, "threading", SimpleNamespace(**names))
