"""The seam between the engine and what computes: the CPU, a GPU, or a test's own device.

A device either computes in host memory, where the chunks lie already, or has a memory of its own: an arena of slots,
with copies in and out that run beside the arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ....errors import EnvironmentFailure
from ....io.sizes import format_size

if TYPE_CHECKING:
    from torch import Tensor


class Marker(Protocol):
    """A point in a device's work."""

    def wait(self) -> None:
        """Return once the device has come to it."""


class OutOfDeviceMemory(EnvironmentFailure):
    """Another process holds memory of the device that the schedule counted on.

    Args:
        name: the device.
        wanted: bytes.
        free: bytes that are.
    """

    def __init__(self, name: str, wanted: int, free: int) -> None:
        self.name = name
        self.free_slots = free
        super().__init__(
            f"{name}: {format_size(wanted, up=True)} are needed and {format_size(free)} are free: another process "
            "holds the rest; end it, or give a smaller --max-vram"
        )


class Done:
    """The marker of work that is done when the call returns."""

    def wait(self) -> None:
        """Return at once."""


class Device(Protocol):
    """What the executor asks of a device. One upload thread, `threads` compute threads, one download thread call it."""

    name: str
    separate: bool  # whether it has a memory of its own
    threads: int

    def open(self, slots: int, slot_bytes: int, workspace: int, host: Tensor) -> None:
        """Take all the memory that will be used.

        Args:
            slots: of the arena; 0 for a device without a memory of its own.
            slot_bytes: of each.
            workspace: bytes for each compute thread.
            host: the arena in RAM, one-dimensional uint8, that copies come from and go to.
        """

    def workspace(self, thread: int) -> Tensor:
        """The workspace of a compute thread: one-dimensional uint8."""

    def slot(self, number: int, nbytes: int) -> Tensor:
        """The first `nbytes` bytes of a slot: one-dimensional uint8."""

    def upload(self, source: Tensor, number: int) -> None:
        """Begin to copy `source` (uint8, in the host arena) to the start of a slot."""

    def uploads_begun(self) -> Marker:
        """A marker behind all uploads begun so far."""

    def begin(self, thread: int, after: Marker) -> None:
        """Let what the thread computes next wait for `after`."""

    def download(self, thread: int, number: int, target: Tensor) -> Marker:
        """Begin to copy from the start of a slot to `target` (host) once the thread's work so far is done."""

    def peak(self) -> int:
        """The most bytes that were held on the device."""

    def close(self) -> None:
        """Give everything back, whether or not `open` came to its end."""
