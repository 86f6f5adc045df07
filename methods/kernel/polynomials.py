"""exp and log as fixed polynomials of operations that every backend rounds in the same way."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .array import Array, clamp, where
from .expression import Extent, Node, Trace, Type

_LOG2_E = 1.4426950408889634
_LN2_HIGH = 6.93147180369123816490e-01  # 33 bits, so its product with an exponent is exact (fdlibm)
_LN2_LOW = 1.90821492927058770002e-10
_SHIFT = 1.5 * 2.0**52  # adding it rounds to an integer, which its lowest bits then hold
_SHIFT_BITS = 0x4338_0000_0000_0000
_ONE_BITS = 1023 << 52
_MANTISSA = (1 << 52) - 1
_SQRT2 = 1.4142135623730951
_SMALLEST = 2.0**-1022  # the smallest normal number
_FACTORIALS = (1, 1, 2, 6, 24, 120, 720, 5040, 40320, 362880, 3628800, 39916800, 479001600, 6227020800)


def exponential(x: Array) -> Array:
    """e to the power of x for float64: 2^k e^r with an integer k and r of at most ln(2) / 2, by the Taylor polynomial.

    x is limited to -708 to 709, where the result is a normal number.
    """
    x = clamp(x, -708.0, 709.0)
    shifted = x * _LOG2_E + _SHIFT
    k = shifted - _SHIFT
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    power = _integer(x.trace, "bits", shifted.node)
    exponent = _integer(x.trace, "ishl", _integer(x.trace, "iadd", power, 1023 - _SHIFT_BITS), 52)
    scale = _integer(x.trace, "from_bits", exponent)
    return _horner(r, [1 / factorial for factorial in _FACTORIALS]) * Array(scale, x.trace)


def logarithm(x: Array) -> Array:
    """The natural logarithm for float64: e ln(2) + log(m), sqrt(1/2) <= m <= sqrt(2), by the series of atanh."""
    trace = x.trace
    bits = _integer(trace, "bits", x.node)
    exponent = _integer(trace, "iadd", _integer(trace, "ishr", bits, 52), -1023)
    mantissa = _integer(trace, "ior", _integer(trace, "iand", bits, _MANTISSA), _ONE_BITS)
    m = Array(_integer(trace, "from_bits", mantissa), trace)
    e = Array(trace.number(exponent), trace)
    large = Array(trace.wide(trace.number((m > _SQRT2).node)), trace)
    m, e = m * (1.0 - 0.5 * large), e + large
    f = (m - 1.0) / (m + 1.0)
    series = _horner(f * f, [2.0 / (2 * n + 1) for n in range(11)])
    result = e * _LN2_HIGH + (f * series + e * _LN2_LOW)
    return where(x >= _SMALLEST, result, math.nan) + (x - x)


def _horner(x: Array, coefficients: Sequence[float]) -> Array:
    result = x * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        result = result * x + coefficient
    return result


def _integer(trace: Trace, op: str, a: Node, value: int = 0) -> Node:
    """An operation on integers; ``bits`` makes one of a float64, and ``from_bits`` the reverse."""
    result = Type.WIDE if op == "from_bits" else Type.INTEGER
    function = _INTEGERS[op]
    if a.constant:
        return trace.node("constant", (), result, Extent.TENSOR, function(a.value, value))
    if a.in_tile:
        return trace.node(op, (a,), result, value=value)
    return trace.scalar(lambda number: function(number, value), (a,), result)


def _wrapped(number: int) -> int:
    """The int64 with the same lowest 64 bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


_INTEGERS: Mapping[str, Callable[[Any, int], Any]] = {
    "bits": lambda a, _: struct.unpack("<q", struct.pack("<d", a))[0],
    "from_bits": lambda a, _: struct.unpack("<d", struct.pack("<q", a))[0],
    "iadd": lambda a, value: _wrapped(a + value),
    "iand": lambda a, value: a & value,
    "ior": lambda a, value: a | value,
    "ishl": lambda a, value: _wrapped(a << value),
    "ishr": lambda a, value: a >> value,
}
"""The operations on Python numbers, for constants and scalars."""
