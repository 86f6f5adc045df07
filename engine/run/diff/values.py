"""Decodes stored elements to float64: exactly, except for 64-bit integers, which `decode_exactly` splits in two."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....io.tensors.dtypes import DType

Floats = NDArray[np.float64]

_STORED = {
    "BOOL": "u1",
    **{f"{kind}{bits}": f"<{kind.lower()}{bits // 8}" for kind in "UI" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
    "BF16": "<u2",
}
"""numpy's dtype for the stored elements of each dtype; F8 dtypes are stored as `u1`."""

_EXPONENTS = {"F8_E4M3": 4, "F8_E5M2": 5, "F8_E4M3FNUZ": 4, "F8_E5M2FNUZ": 5}
"""Number of exponent bits of each 8-bit float with a sign."""


def can_decode(dtype: DType) -> bool:
    """Whether the elements of a dtype are numbers that float64 can hold: all but packed and complex ones."""
    return dtype.name in _STORED or dtype.name in _EXPONENTS or dtype.name == "F8_E8M0"


def is_wide(dtype: DType) -> bool:
    """Whether a dtype has integers that float64 can't hold."""
    return dtype.name in ("I64", "U64")


def decode(data: memoryview, dtype: DType, values: Floats, scratch: NDArray[np.uint32]) -> None:
    """Decode stored elements; 64-bit integers are rounded.

    Args:
        data: bytes of the elements.
        dtype: dtype of the elements.
        values: one-dimensional array that receives the values.
        scratch: array with an element for each of `values`, which is overwritten.
    """
    if dtype.name == "BF16":  # the upper half of a float32
        bits = scratch[: values.size]
        np.left_shift(_stored(data, dtype), np.uint32(16), out=bits, dtype=np.uint32)
        np.copyto(values, bits.view("<f4"))
    elif dtype.name == "BOOL":
        np.not_equal(_stored(data, dtype), 0, out=values)
    elif dtype.name in _STORED:
        np.copyto(values, _stored(data, dtype))
    else:
        np.take(_f8_values(dtype.name), np.frombuffer(data, "u1"), out=values, mode="clip")


def decode_exactly(
    data: memoryview, dtype: DType, high: Floats, low: Floats, scratch: tuple[NDArray[np.uint32], Floats]
) -> None:
    """Decode stored elements to values that are the exact sum of two float64 numbers.

    Args:
        data: bytes of the elements.
        dtype: dtype of the elements.
        high: array that receives the values; for 64-bit integers, their multiples of 2^32.
        low: array that receives the rest: from 0 to 2^32 - 1 for 64-bit integers, otherwise 0.
        scratch: arrays with an element for each value, which are overwritten.
    """
    if not is_wide(dtype):
        decode(data, dtype, high, scratch[0])
        low.fill(0)
        return
    stored = _stored(data, dtype)
    bits: NDArray[Any] = scratch[1].view(stored.dtype)
    np.right_shift(stored, 32, out=bits)
    np.copyto(high, bits)
    np.multiply(high, 2.0**32, out=high)
    np.bitwise_and(stored, 0xFFFFFFFF, out=bits)
    np.copyto(low, bits)


def _stored(data: memoryview, dtype: DType) -> NDArray[Any]:
    return np.frombuffer(data, _STORED[dtype.name])


@cache
def _f8_values(name: str) -> Floats:
    """Return the values of the 256 codes of an 8-bit float."""
    if name == "F8_E8M0":
        return np.array([*(2.0 ** (code - 127) for code in range(255)), np.nan])
    mantissa = 7 - _EXPONENTS[name]
    unsigned_zero = name.endswith("FNUZ")
    bias = (1 << (_EXPONENTS[name] - 1)) - (0 if unsigned_zero else 1)
    values = []
    for code in range(128):
        exponent, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
        significand = fraction / (1 << mantissa) + (exponent > 0)
        values.append(significand * 2.0 ** (max(exponent, 1) - bias))
    if name == "F8_E4M3":
        values[127] = np.nan
    elif name == "F8_E5M2":
        values[124:] = [np.inf, np.nan, np.nan, np.nan]
    negative = [-value for value in values]
    if unsigned_zero:
        negative[0] = np.nan
    return np.array([*values, *negative])
