"""The memory that a kernel needs for a tile, as a linear function of the tile's elements."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """A number of bytes that grows linearly with the elements of a tile.

    Args:
        constant: bytes for any tile.
        slope: bytes per element.
    """

    constant: float
    slope: float = 0.0

    def at(self, elements: int) -> int:
        """The number of bytes for a tile with this number of elements."""
        return int(-(-(self.constant + self.slope * elements) // 1))

    @classmethod
    def through(cls, first: tuple[int, int], second: tuple[int, int] | None) -> Line:
        """The line through two points, (elements, bytes) each, or a constant for a single point."""
        if second is None or second[0] == first[0]:
            return cls(first[1])
        slope = max(0.0, (second[1] - first[1]) / (second[0] - first[0]))
        return cls(max(0.0, first[1] - slope * first[0]), slope)


@dataclass(frozen=True, slots=True)
class Footprint:
    """The memory that one compute thread needs for a kernel.

    Args:
        workspace: bytes taken from the thread's workspace.
        allocated: bytes allocated elsewhere: temporaries of torch, numpy and Python, and a pass's result.
    """

    workspace: Line
    allocated: Line
