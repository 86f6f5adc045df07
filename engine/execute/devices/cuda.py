"""A CUDA GPU as a device: an arena, and streams for uploads, for downloads and for each compute thread."""

# torch.cuda's streams and events have no type hints.
# mypy: allow-untyped-calls

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
from torch import Tensor

from ....errors import UsageError
from .base import Marker, OutOfDeviceMemory


class _Event:
    """A CUDA event as a marker."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        """Wait until the GPU has reached it; other threads run meanwhile."""
        self.event.synchronize()


class _Pinned:
    """The host arena, registered (pinned) with CUDA for fast copies: once, for all GPUs of a merge."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._address = 0
        self._users = 0

    def pin(self, host: Tensor, device: torch.device) -> bool:
        """Register the arena unless it is registered; return whether it is. If CUDA refuses, copies are slower."""
        with self._lock:
            if self._users == 0:
                runtime: Any = torch.cuda.cudart()
                code = runtime.cudaHostRegister(host.data_ptr(), host.numel(), 1)  # portable: for every GPU
                if int(code) != 0:
                    # CUDA reports the failure again at the next kernel: let it be this one
                    with contextlib.suppress(RuntimeError):
                        torch.ones(1, device=device)
                    return False
                self._address = host.data_ptr()
            elif self._address != host.data_ptr():
                return False  # another merge has registered its own arena
            self._users += 1
            return True

    def unpin(self) -> None:
        """Unregister the arena once its last user has called this."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                runtime: Any = torch.cuda.cudart()
                runtime.cudaHostUnregister(self._address)


_PINNED = _Pinned()


class CudaDevice:
    """One CUDA GPU.

    Args:
        index: number of the GPU.
        threads: number of compute threads, each with a stream: while one waits for a small result, another computes.
    """

    separate = True

    def __init__(self, index: int, threads: int = 2) -> None:
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise UsageError(
                f"cuda:{index} does not exist: this machine has {torch.cuda.device_count()} CUDA devices; use another "
                "one, or --device cpu"
            )
        self.name = f"cuda:{index}"
        self.threads = threads
        self.device = torch.device("cuda", index)
        self._arena: Tensor | None = None
        self._workspaces: list[Tensor] = []
        self._device_before: int | None = None
        self._pinned = False
        self._slot_bytes = 0
        self._lock = threading.Lock()

    def open(self, slots: int, slot_bytes: int, workspace: int, host: memoryview) -> None:
        """Allocate the arena and the workspaces, and register the host arena for fast copies."""
        self._device_before = torch.cuda.current_device()
        torch.cuda.set_device(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)  # forget the peak of an earlier merge
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
        self._pinned = _PINNED.pin(torch.frombuffer(host, dtype=torch.uint8), self.device)

    def workspace(self, thread: int) -> Tensor:
        """Return the workspace of a compute thread."""
        return self._workspaces[thread]

    def slot(self, number: int, nbytes: int) -> Tensor:
        """Return the first `nbytes` bytes of a slot."""
        assert self._arena is not None
        start = number * self._slot_bytes
        return self._arena[start : start + nbytes]

    def upload(self, source: memoryview, number: int) -> None:
        """Start to copy into a slot, on the upload stream."""
        host = torch.frombuffer(source, dtype=torch.uint8)
        with torch.cuda.stream(self._in):
            self.slot(number, len(source)).copy_(host, non_blocking=True)

    def uploads_begun(self) -> Marker:
        """Return an event that follows all uploads started so far."""
        event = torch.cuda.Event()
        event.record(self._in)
        return _Event(event)

    def begin(self, thread: int, after: Marker) -> None:
        """Make the thread's stream current, and make it wait for `after`."""
        stream = self._compute[thread]
        torch.cuda.set_stream(stream)
        assert isinstance(after, _Event)
        stream.wait_event(after.event)

    def download(self, thread: int, number: int, target: memoryview) -> Marker:
        """Start to copy out of a slot, on the download stream."""
        done = torch.cuda.Event()
        done.record(self._compute[thread])
        event = torch.cuda.Event()
        host = torch.frombuffer(target, dtype=torch.uint8)
        with self._lock:
            self._out.wait_event(done)
            with torch.cuda.stream(self._out):
                host.copy_(self.slot(number, len(target)), non_blocking=True)
            event.record(self._out)
        return _Event(event)

    def peak(self) -> int:
        """Return the highest number of bytes that torch's allocator reserved on the GPU at one time."""
        return int(torch.cuda.max_memory_reserved(self.device))

    def close(self) -> None:
        """Free everything."""
        if self._device_before is None:
            return
        try:
            torch.cuda.synchronize(self.device)
        finally:
            if self._pinned:
                self._pinned = False
                _PINNED.unpin()
            self._arena, self._workspaces = None, []
            torch.cuda.empty_cache()
            torch.cuda.set_device(self._device_before)
            self._device_before = None
