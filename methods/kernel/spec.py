"""The terms of a merge method's declaration: its inputs, how it uses a base, and how it fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

BLOCK = 1 << 15
"""Elements in one block of a reduction. Block boundaries do not depend on the tiles."""

ARITHMETIC_VERSION = 3
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


@dataclass(frozen=True)
class InputSpec:
    """The inputs of one output tensor.

    Args:
        count: number of inputs, including the base.
        base: index of the base model's input, or None.
        shape: shape of every input and of the output.
    """

    count: int
    base: int | None
    shape: tuple[int, ...]

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
