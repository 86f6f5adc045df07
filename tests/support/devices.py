"""A device for tests: it has its own address space, counts bytes, keeps to a budget, can be slow, can fail."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from mergeloom.engine.execute.devices.base import Done, Marker, OutOfDeviceMemory


class FailureOnPurpose(RuntimeError):
    """Raised at the operation that a test asked for."""


class CountingDevice:
    """Memory of its own in RAM, behind the seam that CUDA stands behind.

    Args:
        name: of the device.
        budget: bytes that may be held; more is refused.
        threads: compute threads.
        fail_at: the number of the operation (upload, compute, download, from 1) that fails; never where None.
    """

    separate = True

    def __init__(self, name: str, budget: int, threads: int = 1, fail_at: int | None = None) -> None:
        self.name = name
        self.threads = threads
        self.budget = budget
        self.fail_at = fail_at
        self.uploaded = 0
        self.downloaded = 0
        self.operations = 0
        self.held = 0
        self._lock = threading.Lock()

    def open(self, slots: int, slot_bytes: int, workspace: int, host: Tensor) -> None:
        """Take the arena and the workspaces, within the budget."""
        self.held = slots * slot_bytes + self.threads * workspace
        if self.held > self.budget:
            raise OutOfDeviceMemory(self.name, self.held, self.budget)
        self.slot_bytes = slot_bytes
        self.arena = torch.full((slots * slot_bytes,), 0xFF, dtype=torch.uint8)  # NaNs show what was never uploaded
        self.workspaces = [torch.empty(workspace, dtype=torch.uint8) for _ in range(self.threads)]
        self.host = host

    def _operation(self) -> None:
        with self._lock:
            self.operations += 1
            if self.operations == self.fail_at:
                raise FailureOnPurpose(f"{self.name}: operation {self.operations}")

    def workspace(self, thread: int) -> Tensor:
        """The workspace of a compute thread."""
        return self.workspaces[thread]

    def slot(self, number: int, nbytes: int) -> Tensor:
        """The first bytes of a slot."""
        assert 0 <= nbytes <= self.slot_bytes
        return self.arena[number * self.slot_bytes : number * self.slot_bytes + nbytes]

    def upload(self, source: Tensor, number: int) -> None:
        """Copy in."""
        self._operation()
        self.slot(number, source.numel()).copy_(source)
        self.uploaded += source.numel()

    def uploads_begun(self) -> Marker:
        """They are done already."""
        return Done()

    def begin(self, thread: int, after: Marker) -> None:
        """Count the computation."""
        self._operation()

    def download(self, thread: int, number: int, target: Tensor) -> Marker:
        """Copy out."""
        self._operation()
        target.copy_(self.slot(number, target.numel()))
        self.downloaded += target.numel()
        return Done()

    def peak(self) -> int:
        """The most bytes held."""
        return self.held

    def close(self) -> None:
        """Forget the arena."""
