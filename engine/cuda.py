"""A CUDA GPU as a device: one arena, one stream for copies in, one for copies out, one a compute thread."""

# torch.cuda's streams and events have no type hints.
# mypy: allow-untyped-calls

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .device import Marker, OutOfDeviceMemory


class _Event:
    """A CUDA event as a marker."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        """Return once the GPU has come to it; other threads run meanwhile."""
        self.event.synchronize()


class CudaDevice:
    """One GPU.

    Args:
        index: its number.
        threads: compute threads, each with a stream, so that one's wait for a small result hides behind another's
            work.
    """

    separate = True

    def __init__(self, index: int, threads: int = 2) -> None:
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise UsageError(
                f"there is no CUDA device {index} here; use --device cpu, or one of {torch.cuda.device_count()}"
            )
        self.name = f"cuda:{index}"
        self.threads = threads
        self.device = torch.device("cuda", index)
        self._arena: Tensor | None = None
        self._workspaces: list[Tensor] = []
        self._pinned: int | None = None
        self._slot_bytes = 0
        self._lock = threading.Lock()

    def open(self, slots: int, slot_bytes: int, workspace: int, host: Tensor) -> None:
        """Take the arena and the workspaces, and register the host arena for fast copies."""
        torch.cuda.set_device(self.device)
        self._slot_bytes = slot_bytes
        try:
            self._arena = torch.empty(slots * slot_bytes, dtype=torch.uint8, device=self.device)
            self._workspaces = [
                torch.empty(workspace, dtype=torch.uint8, device=self.device) for _ in range(self.threads)
            ]
        except torch.OutOfMemoryError as error:
            self._arena, self._workspaces = None, []
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(self.device)
            raise OutOfDeviceMemory(self.name, slots * slot_bytes + self.threads * workspace, free) from error
        self._in = torch.cuda.Stream(self.device)
        self._out = torch.cuda.Stream(self.device)
        self._compute = [torch.cuda.Stream(self.device) for _ in range(self.threads)]
        runtime: Any = torch.cuda.cudart()
        code = runtime.cudaHostRegister(host.data_ptr(), host.numel(), 1)  # portable: for every GPU of the process
        if int(code) == 0:
            self._pinned = host.data_ptr()

    def workspace(self, thread: int) -> Tensor:
        """The workspace of a compute thread."""
        return self._workspaces[thread]

    def slot(self, number: int, nbytes: int) -> Tensor:
        """The first `nbytes` bytes of a slot."""
        assert self._arena is not None
        start = number * self._slot_bytes
        return self._arena[start : start + nbytes]

    def upload(self, source: Tensor, number: int) -> None:
        """Begin to copy into a slot, on the stream for copies in."""
        with torch.cuda.stream(self._in):
            self.slot(number, source.numel()).copy_(source, non_blocking=True)

    def uploads_begun(self) -> Marker:
        """An event behind all uploads begun so far."""
        event = torch.cuda.Event()
        event.record(self._in)
        return _Event(event)

    def begin(self, thread: int, after: Marker) -> None:
        """Make the thread's stream current, and let it wait for `after`."""
        stream = self._compute[thread]
        torch.cuda.set_stream(stream)
        assert isinstance(after, _Event)
        stream.wait_event(after.event)

    def download(self, thread: int, number: int, target: Tensor) -> Marker:
        """Begin to copy out of a slot, on the stream for copies out."""
        done = torch.cuda.Event()
        done.record(self._compute[thread])
        event = torch.cuda.Event()
        with self._lock:
            self._out.wait_event(done)
            with torch.cuda.stream(self._out):
                target.copy_(self.slot(number, target.numel()), non_blocking=True)
            event.record(self._out)
        return _Event(event)

    def computed(self, thread: int) -> Marker:
        """An event behind what the thread has computed so far."""
        event = torch.cuda.Event()
        event.record(self._compute[thread])
        return _Event(event)

    def peak(self) -> int:
        """The most bytes that torch's allocator has reserved on the GPU."""
        return int(torch.cuda.max_memory_reserved(self.device))

    def close(self) -> None:
        """Give everything back."""
        torch.cuda.synchronize(self.device)
        if self._pinned is not None:
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostUnregister(self._pinned)
            self._pinned = None
        self._arena, self._workspaces = None, []
        torch.cuda.empty_cache()
