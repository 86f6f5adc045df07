"""A CUDA GPU as a device: one arena, one stream for copies in, one for copies out, one a compute thread."""

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
        """Return once the GPU has come to it; other threads run meanwhile."""
        self.event.synchronize()


class _Pinned:
    """The host arena, registered with CUDA for fast copies: once, for all GPUs that a merge computes on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._address = 0
        self._users = 0

    def pin(self, host: Tensor, device: torch.device) -> bool:
        """Register the arena, if that hasn't been done; whether it is. Copies are slower where the system refuses."""
        with self._lock:
            if self._users == 0:
                runtime: Any = torch.cuda.cudart()
                code = runtime.cudaHostRegister(host.data_ptr(), host.numel(), 1)  # portable: for every GPU
                if int(code) != 0:
                    # CUDA remembers the failure, and would blame the next kernel for it: this one
                    with contextlib.suppress(RuntimeError):
                        torch.ones(1, device=device)
                    return False
                self._address = host.data_ptr()
            elif self._address != host.data_ptr():
                return False  # another merge's
            self._users += 1
            return True

    def unpin(self) -> None:
        """Unregister it, for the last of those that it was registered for."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                runtime: Any = torch.cuda.cudart()
                runtime.cudaHostUnregister(self._address)


_PINNED = _Pinned()


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
        self._device_before: int | None = None
        self._pinned = False
        self._slot_bytes = 0
        self._lock = threading.Lock()

    def open(self, slots: int, slot_bytes: int, workspace: int, host: Tensor) -> None:
        """Take the arena and the workspaces, and register the host arena for fast copies."""
        self._device_before = torch.cuda.current_device()
        torch.cuda.set_device(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)  # an earlier merge's peak isn't this one's
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
        self._pinned = _PINNED.pin(host, self.device)

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

    def peak(self) -> int:
        """The most bytes that torch's allocator has reserved on the GPU."""
        return int(torch.cuda.max_memory_reserved(self.device))

    def close(self) -> None:
        """Give everything back."""
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
