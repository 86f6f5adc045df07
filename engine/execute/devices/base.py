"""The interface between the executor and a device that computes: the CPU, a GPU, or a test's own device.

A device either computes in RAM, where the chunks have been read to, or has its own memory: an arena of slots, with
uploads and downloads that overlap the computation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ....errors import EnvironmentFailure
from ....io.sizes import format_size

if TYPE_CHECKING:
    from torch import Tensor


class Marker(Protocol):
    """A point in a device's work, such as a CUDA event."""

    def wait(self) -> None:
        """Wait until the device has reached it."""


class OutOfDeviceMemory(EnvironmentFailure):
    """The device has less free memory than the schedule needs.

    Args:
        name: name of the device.
        wanted: number of bytes that the schedule needs.
        free: number of bytes that are free.
    """

    def __init__(self, name: str, wanted: int, free: int) -> None:
        self.name = name
        self.free = free
        super().__init__(
            f"{name}: {format_size(wanted, up=True)} of memory are needed, but only {format_size(free)} are free: "
            "another process holds the rest; end it, or use a smaller --max-vram"
        )


class Done:
    """A marker of work that is complete when the call returns."""

    def wait(self) -> None:
        """Return at once."""


class Device(Protocol):
    """A device as the executor sees it.

    One upload thread, `threads` compute threads and one download thread call its methods.
    """

    name: str
    separate: bool  # whether it has its own memory
    threads: int

    def open(self, slots: int, slot_bytes: int, workspace: int, host: memoryview) -> None:
        """Allocate all memory of a run.

        Args:
            slots: number of slots of the arena; 0 for a device without its own memory.
            slot_bytes: size of a slot in bytes.
            workspace: size of each compute thread's workspace in bytes.
            host: arena in RAM, which uploads read and downloads write.
        """

    def workspace(self, thread: int) -> Any:
        """Return the workspace of a compute thread, for its backend: a one-dimensional uint8 tensor in the device's own
        memory, or a memoryview of RAM."""

    def slot(self, number: int, nbytes: int) -> Tensor:
        """Return the first `nbytes` bytes of a slot: one-dimensional uint8."""

    def upload(self, source: memoryview, number: int) -> None:
        """Start to copy `source`, bytes of the host arena, to the start of a slot."""

    def uploads_begun(self) -> Marker:
        """Return a marker that is reached once all uploads started so far are complete."""

    def begin(self, thread: int, after: Marker) -> None:
        """Make the next computation of a thread wait for `after`."""

    def download(self, thread: int, number: int, target: memoryview) -> Marker:
        """Start to copy from the start of a slot to `target` in the host arena, after the thread's work so far."""

    def peak(self) -> int:
        """Return the highest number of bytes that were allocated on the device at one time."""

    def close(self) -> None:
        """Free everything, even if `open` failed."""
