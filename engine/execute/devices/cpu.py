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
        self._workspaces: list[Tensor] = []
        self._threads_before: int | None = None

    def open(self, slots: int, slot_bytes: int, workspace: int, host: Tensor) -> None:
        """Allocate the workspaces, and keep torch from using threads of its own."""
        import torch

        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        memory = [take_memory(workspace) for _ in range(self.threads)]
        self._workspaces = [torch.frombuffer(each, dtype=torch.uint8)[:workspace] for each in memory]

    def workspace(self, thread: int) -> Tensor:
        """Return the workspace of a compute thread."""
        return self._workspaces[thread]

    def slot(self, number: int, nbytes: int) -> Tensor:
        """Raise TypeError: the CPU has no memory of its own."""
        raise TypeError("the CPU computes in RAM: it has no slots, uploads or downloads")

    def upload(self, source: Tensor, number: int) -> None:
        """Raise TypeError: the CPU has no memory of its own."""
        raise TypeError("the CPU computes in RAM: it has no slots, uploads or downloads")

    def uploads_begun(self) -> Marker:
        """Return a marker that has been reached: the CPU has no uploads."""
        return Done()

    def begin(self, thread: int, after: Marker) -> None:
        """Do nothing: the CPU has no uploads to wait for."""

    def download(self, thread: int, number: int, target: Tensor) -> Marker:
        """Raise TypeError: the CPU has no memory of its own."""
        raise TypeError("the CPU computes in RAM: it has no slots, uploads or downloads")

    def peak(self) -> int:
        """Return 0: the CPU has no memory of its own."""
        return 0

    def close(self) -> None:
        """Free the workspaces, and restore torch's number of threads."""
        self._workspaces = []
        if self._threads_before is not None:
            import torch

            torch.set_num_threads(self._threads_before)
