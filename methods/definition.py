"""All that the definition of a merge method needs. `mergeloom.methods` has the same names."""

from __future__ import annotations

from .kernel import language
from .kernel.language import *  # noqa: F403
from .kernel.method import merge_method
from .kernel.ranges import Finite, Fraction, HalfWidth, NonNegative, NonNegativeInt, Positive, PositiveInt, Range
from .kernel.signature import PerInput
from .kernel.spec import Absent, Base, MethodError

# fmt: off
__all__ = [
    "Absent", "Base", "Finite", "Fraction", "HalfWidth", "MethodError", "NonNegative", "NonNegativeInt", "PerInput",
    "Positive", "PositiveInt", "Range", "merge_method",
]
# fmt: on
__all__ += language.__all__
