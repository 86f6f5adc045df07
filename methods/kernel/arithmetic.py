"""Arithmetic of Python floats, as IEEE 754 defines it for every operand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from ctypes import c_float

COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


def divide(a: float, b: float) -> float:
    """The quotient of two floats as IEEE 754 defines it, also for a divisor of 0."""
    if b:
        return a / b
    return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1.0, b)


ARITHMETIC: Mapping[str, Callable[[float, float], float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": divide,
    "minimum": lambda a, b: b if b < a else a,
    "maximum": lambda a, b: b if b > a else a,
}


def next_power(x: float) -> float:
    """x, or the next power of 2 of a larger magnitude, with x's sign; 0, NaN and infinities are unchanged."""
    if x == 0 or not math.isfinite(x):
        return x
    fraction, exponent = math.frexp(abs(x))
    exponent -= fraction == 0.5
    return math.copysign(math.ldexp(1.0, max(exponent, -1022)) if exponent < 1024 else math.inf, x)


def nearest_float32(x: float) -> float:
    """The nearest float32."""
    return c_float(x).value
