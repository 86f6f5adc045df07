"""The CPU as a device: it computes in host memory, so it has no slots of its own and nothing to copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arena import take_memory
from .base import Done, Marker

if TYPE_CHECKING:
    from torch import Tensor


class CpuDevice:
    """Compute threads in host memory: nothing is copied."""

    separate = False

    def __init__(self, threads: int) -> None:
        self.name = "cpu"
        self.threads = threads
        self._workspaces: list[Tensor] = []
        self._threads_before: int | None = None

    def open(self, slots: int, slot_bytes: int, workspace: int, host: Tensor) -> None:
        """Take the workspaces, and keep torch from using threads of its own."""
        import torch

        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        memory = [take_memory(workspace) for _ in range(self.threads)]
        self._workspaces = [torch.frombuffer(each, dtype=torch.uint8)[:workspace] for each in memory]

    def workspace(self, thread: int) -> Tensor:
        """The workspace of a compute thread."""
        return self._workspaces[thread]

    def slot(self, number: int, nbytes: int) -> Tensor:
        """There are none."""
        raise TypeError("the CPU computes in host memory")

    def upload(self, source: Tensor, number: int) -> None:
        """There are none."""
        raise TypeError("the CPU computes in host memory")

    def uploads_begun(self) -> Marker:
        """Nothing to wait for."""
        return Done()

    def begin(self, thread: int, after: Marker) -> None:
        """Nothing to wait for."""

    def download(self, thread: int, number: int, target: Tensor) -> Marker:
        """There are none."""
        raise TypeError("the CPU computes in host memory")

    def peak(self) -> int:
        """Nothing beside the host's memory."""
        return 0

    def close(self) -> None:
        """Give the workspaces back, and torch its threads."""
        self._workspaces = []
        if self._threads_before is not None:
            import torch

            torch.set_num_threads(self._threads_before)
