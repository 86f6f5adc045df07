"""Reads what earlier runs have used and written and compares it, in several threads and with small buffers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(slots=True)
class Checked:
    """The progress of some checks.

    Args:
        total: number of bytes to check.
        nbytes: number of bytes checked so far.
        bytes_read: number of bytes read so far; a comparison of two files reads both.
    """

    total: int
    nbytes: int = 0
    bytes_read: int = 0


class Check(ABC):
    """A check of one range of bytes, independent of all other checks."""

    __slots__ = ()

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Size of the range in bytes."""

    @abstractmethod
    def run(self, read: Read) -> None:
        """Check the range, from any thread. An error ends all checks."""


def run_checks(checks: Sequence[Check], buffers: ThreadBuffers, watch: Callable[[Checked], None]) -> Checked:
    """Run checks on several threads, each of which holds two buffers at one time.

    Args:
        checks: checks in the order in which they start.
        buffers: the threads' buffers.
        watch: function that is called at intervals from this thread; if it raises, the checks end.

    Raises:
        MergeloomError: a check failed, or a file could not be read.
    """
    checked = Checked(sum(check.nbytes for check in checks))
    if not checks:
        return checked
    return _Checker(checks, buffers, checked).wait(watch)


class _Checker:
    def __init__(self, checks: Sequence[Check], buffers: ThreadBuffers, checked: Checked) -> None:
        self._checked = checked
        self._buffers = buffers
        self._group = TaskGroup("check")
        self._read_by = [0] * buffers.threads  # each thread counts for itself
        self._done_by = [0] * buffers.threads
        self._reader = Reader(keep_cached=False)
        self._pool = WorkerPool(checks, buffers.threads, self._work, self._group)

    def wait(self, watch: Callable[[Checked], None]) -> Checked:
        try:
            while not self._pool.wait(NOTIFY_SECONDS):
                watch(self._count())
        finally:
            self._group.cancel()
            self._pool.stop()
            self._reader.close()
        self._group.check()
        watch(self._count())
        return self._checked

    def _count(self) -> Checked:
        self._checked.nbytes, self._checked.bytes_read = sum(self._done_by), sum(self._read_by)
        return self._checked

    def _work(self, thread: int, check: Check) -> None:
        def read(file: Path, offset: int, nbytes: int) -> Iterator[memoryview]:
            with self._buffers.take(nbytes) as buffer:
                for start in range(0, nbytes, len(buffer)):
                    if self._group.cancelled:
                        raise Aborted
                    chunk = buffer[: nbytes - start]
                    self._reader.read(file, offset + start, chunk)
                    self._read_by[thread] += len(chunk)
                    yield chunk

        check.run(read)
        self._done_by[thread] += check.nbytes
