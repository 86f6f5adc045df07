"""Reading again what earlier runs have used and written, on several threads and through small buffers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ....io.output.group_commit import Aborted
from ....io.reading import Reader
from ...execute.executor import NOTIFY_SECONDS
from ..transfers import BUFFER_BYTES, WorkerPool

Read = Callable[[Path, int, int], Iterator[memoryview]]
"""``read(file, offset, nbytes)`` yields the bytes of a range in parts; a part is valid until the next one is asked
for."""


@dataclass(slots=True)
class Checked:
    """The progress of some checks.

    Args:
        total: size in bytes of all that is to be checked.
        nbytes: how many of them were checked.
        bytes_read: bytes read for it; a comparison of two files reads both.
    """

    total: int
    nbytes: int = 0
    bytes_read: int = 0


class Check(ABC):
    """A range of bytes that can be checked independently of all others."""

    __slots__ = ()

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Size of the range in bytes."""

    @abstractmethod
    def run(self, read: Read) -> None:
        """Check it, from any thread. What it raises ends all checks."""


def run_checks(checks: Sequence[Check], threads: int, watch: Callable[[Checked], None]) -> Checked:
    """Run checks on several threads, each with two buffers of `BUFFER_BYTES`.

    Args:
        checks: in the order in which they begin.
        threads: number of threads.
        watch: called now and then from this thread; what it raises ends the checks.

    Raises:
        MergeloomError: what a check, or reading a file for it, raised.
    """
    checked = Checked(sum(check.nbytes for check in checks))
    if not checks:
        return checked
    return _Run(checks, threads, checked).wait(watch)


class _Run:
    def __init__(self, checks: Sequence[Check], threads: int, checked: Checked) -> None:
        self._checked = checked
        self._errors: list[BaseException] = []
        self._stopped = False
        self._read_by = [0] * threads  # each thread counts for itself
        self._done_by = [0] * threads
        self._reader = Reader(keep_cached=False)
        self._mover = WorkerPool(checks, threads, self._work, self._errors.append)

    def wait(self, watch: Callable[[Checked], None]) -> Checked:
        try:
            while not self._mover.wait(NOTIFY_SECONDS):
                watch(self._count())
        finally:
            self._stopped = True
            self._mover.stop()
            self._reader.close()
        if self._errors:
            raise self._errors[0]
        watch(self._count())
        return self._checked

    def _count(self) -> Checked:
        self._checked.nbytes, self._checked.bytes_read = sum(self._done_by), sum(self._read_by)
        return self._checked

    def _work(self, thread: int, check: Check) -> None:
        def read(file: Path, offset: int, nbytes: int) -> Iterator[memoryview]:
            buffer = memoryview(bytearray(min(BUFFER_BYTES, nbytes)))
            for start in range(0, nbytes, BUFFER_BYTES):
                if self._stopped:
                    raise Aborted
                part = buffer[: nbytes - start]
                self._reader.read(file, offset + start, part)
                self._read_by[thread] += len(part)
                yield part

        check.run(read)
        self._done_by[thread] += check.nbytes
