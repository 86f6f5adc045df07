"""A device for tests, with its own memory and a budget: it counts bytes, and fails on request."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from mergeloom.engine.execute.devices.base import Done, Marker, OutOfDeviceMemory


class FailureOnPurpose(RuntimeError):
    """The error of the operation that a test lets fail."""


class CountingDevice:
    """A device whose own memory is simulated in RAM, with the interface of a GPU.

    Args:
        name: name of the device.
        budget: limit of its memory in bytes.
        threads: number of compute threads.
        fail_at: number of the operation (upload, compute, download, from 1) that fails; None for no failure.
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

    def open(self, slots: int, slot_bytes: int, workspace: int, host: memoryview) -> None:
        """Allocate the arena and the workspaces, within the budget."""
        self.held = slots * slot_bytes + self.threads * workspace
        if self.held > self.budget:
            raise OutOfDeviceMemory(self.name, self.held, self.budget)
        self.slot_bytes = slot_bytes
        self.arena = torch.full(
            (slots * slot_bytes,), 0xFF, dtype=torch.uint8
        )  # NaNs reveal a read of bytes that were never uploaded
        self.workspaces = [torch.empty(workspace, dtype=torch.uint8) for _ in range(self.threads)]

    def _operation(self) -> None:
        with self._lock:
            self.operations += 1
            if self.operations == self.fail_at:
                raise FailureOnPurpose(f"{self.name}: operation {self.operations}")

    def workspace(self, thread: int) -> Tensor:
        """Return the workspace of a compute thread."""
        return self.workspaces[thread]

    def slot(self, number: int, nbytes: int) -> Tensor:
        """Return the first bytes of a slot."""
        assert 0 <= nbytes <= self.slot_bytes
        return self.arena[number * self.slot_bytes : number * self.slot_bytes + nbytes]

    def upload(self, source: memoryview, number: int) -> None:
        """Copy into a slot."""
        self._operation()
        self.slot(number, len(source)).copy_(torch.frombuffer(source, dtype=torch.uint8))
        self.uploaded += len(source)

    def uploads_begun(self) -> Marker:
        """Return a marker that has been reached: uploads are synchronous."""
        return Done()

    def begin(self, thread: int, after: Marker) -> None:
        """Count the computation."""
        self._operation()

    def download(self, thread: int, number: int, target: memoryview) -> Marker:
        """Copy out of a slot."""
        self._operation()
        torch.frombuffer(target, dtype=torch.uint8).copy_(self.slot(number, len(target)))
        self.downloaded += len(target)
        return Done()

    def peak(self) -> int:
        """Return the bytes held."""
        return self.held

    def close(self) -> None:
        """Do nothing."""
