"""exp and log as fixed polynomials of operations that every backend rounds in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .expression import Node, Trace, Type

if TYPE_CHECKING:
    from .array import Array

_LOG2_E = 1.4426950408889634
_LN2_HIGH = 6.93147180369123816490e-01  # 33 bits, so its product with an exponent is exact (fdlibm)
_LN2_LOW = 1.90821492927058770002e-10
_SHIFT = 1.5 * 2.0**52  # adding it rounds to an integer, which its lowest bits then hold
_SHIFT_BITS = 0x4338_0000_0000_0000
_ONE_BITS = 1023 << 52
_MANTISSA = (1 << 52) - 1
_SQRT2 = 1.4142135623730951
_FACTORIALS = (1, 1, 2, 6, 24, 120, 720, 5040, 40320, 362880, 3628800, 39916800, 479001600, 6227020800)


def exponential(x: Array) -> Array:
    """e to the power of x for float64: 2^k e^r with an integer k and r of at most ln(2) / 2, by the Taylor polynomial.

    x is limited to -708 to 709, where the result is a normal number.
    """
    from .language import clamp

    x = clamp(x, -708.0, 709.0)
    shifted = x * _LOG2_E + _SHIFT
    k = shifted - _SHIFT
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    power = _integer(x.trace, "bits", shifted.node)
    exponent = _integer(x.trace, "ishl", _integer(x.trace, "iadd", power, 1023 - _SHIFT_BITS), 52)
    scale = x.trace.node("from_bits", (exponent,), Type.WIDE)
    return _horner(r, [1 / factorial for factorial in _FACTORIALS]) * type(x)(scale, x.trace)


def logarithm(x: Array) -> Array:
    """The natural logarithm for float64: e ln(2) + log(m), sqrt(1/2) <= m <= sqrt(2), by the series of atanh."""
    from .language import where

    trace, array = x.trace, type(x)
    bits = _integer(trace, "bits", x.node)
    exponent = _integer(trace, "iadd", _integer(trace, "ishr", bits, 52), -1023)
    mantissa = _integer(trace, "ior", _integer(trace, "iand", bits, _MANTISSA), _ONE_BITS)
    m = array(trace.node("from_bits", (mantissa,), Type.WIDE), trace)
    e = array(trace.number(exponent), trace)
    large = array(trace.wide(trace.number((m > _SQRT2).node)), trace)
    m, e = m * (1.0 - 0.5 * large), e + large
    f = (m - 1.0) / (m + 1.0)
    series = _horner(f * f, [2.0 / (2 * n + 1) for n in range(11)])
    result = e * _LN2_HIGH + (f * series + e * _LN2_LOW)
    return where(x > 0, result, float("nan")) + (x - x)


def _horner(x: Array, coefficients: Sequence[float]) -> Array:
    result = x * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        result = result * x + coefficient
    return result


def _integer(trace: Trace, op: str, a: Node, value: int | None = None) -> Node:
    return trace.node(op, (a,), Type.INTEGER, value=value)
