"""Ranges of parameter values, declared in a method's signature and used for validation, help texts and docs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True, slots=True)
class Range:
    """The finite numbers between two bounds.

    Args:
        minimum: the lower bound; minus infinity for none.
        maximum: the upper bound; infinity for none.
        exclusive_minimum: whether `minimum` itself is out of range.
        exclusive_maximum: whether `maximum` itself is out of range.

    Raises:
        ValueError: if no number lies in the range.
    """

    minimum: float = -math.inf
    maximum: float = math.inf
    exclusive_minimum: bool = False
    exclusive_maximum: bool = False

    def __post_init__(self) -> None:
        empty = self.minimum == self.maximum and (self.exclusive_minimum or self.exclusive_maximum)
        if not self.minimum <= self.maximum or empty:
            raise ValueError(f"no number lies in the range from {self.minimum:g} to {self.maximum:g}")

    def __contains__(self, number: float) -> bool:
        above = number > self.minimum if self.exclusive_minimum else number >= self.minimum
        below = number < self.maximum if self.exclusive_maximum else number <= self.maximum
        finite = isinstance(number, int) or math.isfinite(number)  # an int may be too large for isfinite
        return above and below and finite

    def __str__(self) -> str:
        """The range in words that fit after "must be": ``between 0 and 1``, ``at least 0 and below 0.5``."""
        bounded = math.isfinite(self.minimum) and math.isfinite(self.maximum)
        if bounded and not (self.exclusive_minimum or self.exclusive_maximum):
            return f"between {self.minimum:g} and {self.maximum:g}"
        bounds = []
        if math.isfinite(self.minimum):
            bounds.append(f"{'above' if self.exclusive_minimum else 'at least'} {self.minimum:g}")
        if math.isfinite(self.maximum):
            bounds.append(f"{'below' if self.exclusive_maximum else 'at most'} {self.maximum:g}")
        return " and ".join(bounds) or "any finite number"


Finite = Annotated[float, Range()]
"""Any finite number: a weight, a factor, a position on a line."""

Fraction = Annotated[float, Range(0, 1)]
"""A fraction of a total, or the absolute value of a cosine."""

NonNegative = Annotated[float, Range(0)]
"""A distance, a tolerance or a threshold; 0 turns it off."""

Positive = Annotated[float, Range(0, exclusive_minimum=True)]
"""A distance or a tolerance that can't be 0."""

PositiveInt = Annotated[int, Range(1)]
"""A number of steps that can't be 0."""

NonNegativeInt = Annotated[int, Range(0)]
"""A number of steps."""

HalfWidth = Annotated[float, Range(0, 0.5, exclusive_maximum=True)]
"""Half the width of an interval that lies strictly between 0 and 1."""
