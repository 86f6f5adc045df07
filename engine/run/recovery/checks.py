"""Reads what earlier runs have used and written and compares it, in several threads and with small buffers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ....io.counters import IoCounters
from ....io.output.group_commit import Aborted
from ....io.reading import Reader
from ....io.task_group import TaskGroup
from ...execute.executor import NOTIFY_SECONDS
from ..buffers import ThreadBuffers
from ..transfers import WorkerPool

CHECKS = "check buffers"
"""Name of the buffers of checks in the ledger; each thread holds two at one time."""
Read = Callable[[Path, int, int], Iterator[memoryview]]
"""``read(file, offset, nbytes)`` yields the bytes of a range in chunks; the next chunk overwrites the last."""
Watch = Callable[[int, int], None]
"""``watch(bytes_read, total)`` is called at intervals while checks run, with their total number of bytes to read."""


class Check(ABC):
    """A check of one range of bytes, independent of all other checks."""

    __slots__ = ()

    @property
    @abstractmethod
    def bytes_to_read(self) -> int:
        """Number of bytes that the check reads; a comparison of two files reads both."""

    @abstractmethod
    def run(self, read: Read) -> None:
        """Check the range, from any thread. An error ends all checks."""


def run_checks(checks: Sequence[Check], buffers: ThreadBuffers, counters: IoCounters, watch: Watch) -> int:
    """Run checks on several threads, each of which holds two buffers at one time.

    Args:
        checks: checks in the order in which they start.
        buffers: the threads' buffers.
        counters: counters of the bytes that are read to check them.
        watch: function that is called at intervals from this thread; if it raises, the checks end.

    Returns:
        The number of bytes that were read.

    Raises:
        MergeloomError: a check failed, or a file could not be read.
    """
    return _Checker(checks, buffers, counters).wait(watch) if checks else 0


class _Checker:
    def __init__(self, checks: Sequence[Check], buffers: ThreadBuffers, counters: IoCounters) -> None:
        self._total = sum(check.bytes_to_read for check in checks)
        self._buffers = buffers
        self._counters = counters
        self._before = counters.bytes_checked  # nothing else is checked meanwhile
        self._group = TaskGroup("check")
        self._reader = Reader(keep_cached=False)
        self._pool = WorkerPool(checks, buffers.threads, self._work, self._group)

    def wait(self, watch: Watch) -> int:
        try:
            while not self._pool.wait(NOTIFY_SECONDS):
                watch(self._bytes_read, self._total)
        finally:
            self._group.cancel()
            self._pool.stop()
            self._reader.close()
        self._group.check()
        watch(self._bytes_read, self._total)
        return self._bytes_read

    @property
    def _bytes_read(self) -> int:
        return self._counters.bytes_checked - self._before

    def _work(self, thread: int, check: Check) -> None:
        def read(file: Path, offset: int, nbytes: int) -> Iterator[memoryview]:
            with self._buffers.take(nbytes) as buffer:
                for start in range(0, nbytes, len(buffer)):
                    if self._group.cancelled:
                        raise Aborted
                    chunk = buffer[: nbytes - start]
                    self._reader.read(file, offset + start, chunk)
                    self._counters.add(checked=len(chunk))
                    yield chunk

        check.run(read)
