"""All that the definition of a merge method needs. `mergeloom.methods` has the same names."""

from __future__ import annotations

from .kernel.language import (
    Array,
    Inputs,
    add,
    clamp,
    exp,
    host,
    log,
    maximum,
    mean,
    minimum,
    sign,
    single,
    sqrt,
    where,
    wide,
)
from .kernel.method import merge_method
from .kernel.ranges import Finite, Fraction, HalfWidth, NonNegative, NonNegativeInt, Positive, PositiveInt, Range
from .kernel.signature import PerInput
from .kernel.spec import Absent, Base, MethodError

__all__ = [  # fmt: skip
    "Absent",
    "Array",
    "Base",
    "Finite",
    "Fraction",
    "HalfWidth",
    "Inputs",
    "MethodError",
    "NonNegative",
    "NonNegativeInt",
    "PerInput",
    "Positive",
    "PositiveInt",
    "Range",
    "add",
    "clamp",
    "exp",
    "host",
    "log",
    "maximum",
    "mean",
    "merge_method",
    "minimum",
    "sign",
    "single",
    "sqrt",
    "where",
    "wide",
]
