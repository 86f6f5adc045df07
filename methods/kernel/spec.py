"""The terms of a merge method's declaration: its inputs, how it uses a base, and how it fails."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from .access import ALIGNED, Access, Shape, matrices

BLOCK = 1 << 15
"""Elements in one block of a reduction. Block boundaries do not depend on the tiles."""

ARITHMETIC_VERSION = 4
"""Incremented by every change that alters the bytes of any output: a method, the blocks of a sum, rounding, random
numbers. Only the version that started a merge can resume it."""


class MethodError(ValueError):
    """An invalid parameter value or number of inputs.

    Args:
        message: what is wrong and what to write instead.
        parameters: names in the recipe of the parameters to change, the most likely one first.
        index: index of the input that has the invalid values; None for shared parameters and for several inputs.
    """

    def __init__(self, message: str, *, parameters: Sequence[str] = (), index: int | None = None) -> None:
        super().__init__(message)
        self.parameters = tuple(parameters)
        self.index = index


class HostError(Exception):
    """A Python function of a method failed. The message names its error."""


class Base(Enum):
    """How a method uses the recipe's base model."""

    NONE = "none"  # a base model is an input like any other
    OPTIONAL = "optional"
    REQUIRED = "required"


class Absent(Enum):
    """How a method handles an optional tensor (a head, a bias) that only some inputs have."""

    PRESENT = "merges the ones that are there"
    BASE_PRESENT = "merges the ones that are there, if the base has it"
    SINGLE = "passes a single one through"
    SINGLE_BASE = "passes a single one through, if it is the base's"


class Unit(Enum):
    """The unit that tiles do not split."""

    ELEMENT = "element"
    ROW = "row"
    BLOCK_ROW = "row of blocks"


@dataclass(frozen=True)
class InputSpec:
    """The inputs of one output tensor.

    Args:
        count: number of inputs, including the base.
        base: index of the base model's input, or None.
        shape: shape of the output, and of every input without an access or part of its own.
        accesses: which elements of each input a range of the output's elements needs; empty if all are `ALIGNED`.
        parts: shape of each input as it is stored; empty if all have the output's shape.

    Raises:
        ValueError: there are accesses or parts for another number of inputs, or one does not fit the output's shape.
    """

    count: int
    base: int | None
    shape: Shape
    accesses: tuple[Access, ...] = ()
    parts: tuple[Shape, ...] = ()

    def __post_init__(self) -> None:
        if len(self.accesses) not in (0, self.count) or len(self.parts) not in (0, self.count):
            raise ValueError(f"{self.count} inputs have {len(self.accesses)} accesses and {len(self.parts)} parts")
        for index in range(self.count if self.accesses or self.parts else 0):
            access, part = self.access(index), self.part(index)
            if not access.part_shape_fits(self.shape, part):
                raise ValueError(f"a part of shape {list(part)} does not fit {list(self.shape)} with {access}")

    def access(self, index: int) -> Access:
        """Which elements of an input a range of the output's elements needs."""
        return self.accesses[index] if self.accesses else ALIGNED

    def part(self, index: int) -> Shape:
        """The shape of an input as it is stored."""
        return self.parts[index] if self.parts else self.shape

    def staged(self, index: int, first: int, count: int) -> int:
        """The number of elements of an input that are staged for elements [first, first + count) of the output."""
        access = self.access(index)
        if access.aligned:
            return count
        return sum(span.length for span in access.spans(self.shape, self.part(index), first, count))

    def resized(self, shape: Shape) -> InputSpec:
        """The same inputs for an output of another shape."""
        if not self.accesses and not self.parts:
            return replace(self, shape=shape)
        pairs = [self.access(index).resized(self.part(index), shape) for index in range(self.count)]
        accesses, parts = (tuple(each) for each in zip(*pairs, strict=True))
        return InputSpec(self.count, self.base, shape, accesses, parts)

    def selected(self, indices: Sequence[int]) -> InputSpec:
        """Some of the inputs."""
        base = indices.index(self.base) if self.base in indices else None
        accesses = tuple(self.accesses[index] for index in indices) if self.accesses else ()
        parts = tuple(self.parts[index] for index in indices) if self.parts else ()
        return InputSpec(len(indices), base, self.shape, accesses, parts)

    @property
    def others(self) -> tuple[int, ...]:
        """The indices of the inputs other than the base, in recipe order."""
        return tuple(i for i in range(self.count) if i != self.base)

    @property
    def rows(self) -> int:
        """The number of rows: the product of all dimensions except the last; 1 for a vector."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows

    @property
    def columns(self) -> int:
        """The number of elements in a row: the last dimension; 1 for a 0-d tensor."""
        return self.shape[-1] if self.shape else 1


def rows_of_blocks(shape: Shape, heights: Iterable[int]) -> int:
    """The number of rows that ranges of complete rows of blocks start at a multiple of.

    Blocks start anew in each matrix of a stack, so this is a complete matrix if its last row of blocks is partial.

    Args:
        shape: shape of the tensor.
        heights: rows of the blocks.
    """
    stack, rows, _ = matrices(shape)
    height = math.lcm(*heights)
    return rows if height > rows or (stack > 1 and rows % height) else height
