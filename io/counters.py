"""The I/O counters of one command: bytes are counted where they are moved, and displays and reports read the counts."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass(slots=True)
class IoCounters:
    """Numbers of bytes of tensors, which only grow. Thread-safe.

    Args:
        bytes_read: bytes read, re-reads included.
        bytes_written: bytes written.
        bytes_shared: bytes in disk blocks that were reflinked, so they were neither read nor written.
        bytes_checked: bytes that were read only to check them; not included in `bytes_read`.
        refused: bytes that the file system refused to reflink, by error number; they were copied instead.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    bytes_shared: int = 0
    bytes_checked: int = 0
    refused: dict[int, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def add(self, *, read: int = 0, written: int = 0, shared: int = 0, checked: int = 0) -> None:
        """Count bytes that have just been moved."""
        with self._lock:
            self.bytes_read += read
            self.bytes_written += written
            self.bytes_shared += shared
            self.bytes_checked += checked

    def add_refused(self, number: int, nbytes: int) -> None:
        """Count bytes that the file system refused to reflink with this error number."""
        with self._lock:
            self.refused[number] = self.refused.get(number, 0) + nbytes
