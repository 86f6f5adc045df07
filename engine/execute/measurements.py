"""What a run reports: its progress while it runs, and its measurements."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...io.counters import IoCounters
from .lanes import LaneTime


@dataclass(slots=True)
class Progress:
    """The progress of a command; the numbers only grow.

    Args:
        bytes_read: tensor bytes read.
        bytes_written: tensor bytes written.
        bytes_checked: bytes read to check an interrupted merge.
        bytes_to_check: bytes to read for that; 0 once the merge itself is running.
        bytes_earlier: bytes of `bytes_read` and `bytes_written` that earlier runs of a resumed merge have moved.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    bytes_checked: int = 0
    bytes_to_check: int = 0
    bytes_earlier: int = 0


@dataclass(slots=True)
class Measured:
    """Measurements of a run.

    Args:
        io: numbers of bytes that were moved.
        seconds: seconds from the first step to the end.
        ram_peak: highest number of bytes in slots of RAM.
        vram_peak: highest number of bytes held on a device.
        lanes: time of each lane, by name.
        overflowed: number of new infinities or NaNs, by output tensor.
        reduced_vram: reduced VRAM limit in bytes, by GPU with less free memory than planned.
    """

    io: IoCounters = field(default_factory=IoCounters)
    seconds: float = 0.0
    ram_peak: int = 0
    vram_peak: int = 0
    lanes: dict[str, LaneTime] = field(default_factory=dict)
    overflowed: dict[str, int] = field(default_factory=dict, repr=False)
    reduced_vram: dict[str, int] = field(default_factory=dict)

    @property
    def bytes_read(self) -> int:
        """Tensor bytes read."""
        return self.io.bytes_read

    @property
    def bytes_written(self) -> int:
        """Tensor bytes written."""
        return self.io.bytes_written

    @property
    def bytes_shared(self) -> int:
        """Tensor bytes in reflinked disk blocks."""
        return self.io.bytes_shared

    @property
    def bytes_checked(self) -> int:
        """Bytes that were read only to check them: of an interrupted merge and its sources, and of buffers."""
        return self.io.bytes_checked
