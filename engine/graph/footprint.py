"""The memory that a kernel's passes need for a tile, as a function of its elements."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """A number of bytes that grows linearly with the elements of a tile.

    Args:
        constant: bytes that any tile takes.
        slope: bytes of each element.
    """

    constant: float
    slope: float = 0.0

    def at(self, elements: int) -> int:
        """The bytes of a tile of so many elements."""
        return int(-(-(self.constant + self.slope * elements) // 1))

    @classmethod
    def through(cls, first: tuple[int, int], second: tuple[int, int] | None) -> Line:
        """The line through two points, (elements, bytes) each, or the constant of a single one."""
        if second is None or second[0] == first[0]:
            return cls(first[1])
        slope = max(0.0, (second[1] - first[1]) / (second[0] - first[0]))
        return cls(max(0.0, first[1] - slope * first[0]), slope)


@dataclass(frozen=True, slots=True)
class Footprint:
    """The memory of one compute thread at a kernel.

    Args:
        workspace: bytes taken from the thread's workspace.
        allocated: bytes allocated besides: temporaries of torch, numpy and Python, and a pass's result.
    """

    workspace: Line
    allocated: Line
