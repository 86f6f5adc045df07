"""The CPU as a device: it computes in RAM, so it has no slots of its own and nothing to upload."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arena import take_memory
from .base import Done, Marker

if TYPE_CHECKING:
    from torch import Tensor


class CpuDevice:
    """The CPU, computing in RAM.

    Args:
        threads: number of compute threads.
    """

    separate = False

    def __init__(self, threads: int) -> None:
        self.name = "cpu"
        self.threads = threads
        self._workspaces: list[memoryview] = []

    def open(self, slots: int, slot_bytes: int, workspace: int, host: memoryview) -> None:
        """Allocate the workspaces."""
        self._workspaces = [memoryview(take_memory(workspace))[:workspace] for _ in range(self.threads)]

    def workspace(self, thread: int) -> memoryview:
        """Return the workspace of a compute thread, aligned to pages."""
        return self._workspaces[thread]

    def slot(self, number: int, nbytes: int) -> Tensor:
        """Raise TypeError: the CPU has no memory of its own."""
        raise TypeError("the CPU computes in RAM: it has no slots, uploads or downloads")

    def upload(self, source: memoryview, number: int) -> None:
        """Raise TypeError: the CPU has no memory of its own."""
        raise TypeError("the CPU computes in RAM: it has no slots, uploads or downloads")

    def uploads_begun(self) -> Marker:
        """Return a marker that has been reached: the CPU has no uploads."""
        return Done()

    def begin(self, thread: int, after: Marker) -> None:
        """Do nothing: the CPU has no uploads to wait for."""

    def download(self, thread: int, number: int, target: memoryview) -> Marker:
        """Raise TypeError: the CPU has no memory of its own."""
        raise TypeError("the CPU computes in RAM: it has no slots, uploads or downloads")

    def peak(self) -> int:
        """Return 0: the CPU has no memory of its own."""
        return 0

    def close(self) -> None:
        """Free the workspaces."""
        self._workspaces = []
