"""Encodes values as FP8 blocks: F8_E4M3 codes, and one scale for each block of rows and columns.

The scale is the largest magnitude of the block divided by 448, the largest code, and ``code * scale`` is the value. It
is rounded to its own dtype before values are divided by it, because a reader decodes with the scale that it reads.
All arithmetic is in float32, also for float64 values.
"""

from __future__ import annotations

from typing import Any

from ..kernel.array import Array, clamp, maximum
from ..kernel.decoder import Encoder, block_max, next_power_of_two, rounded
from ..kernel.language import single

LARGEST = 448.0
"""The largest number of F8_E4M3."""
SMALLEST_MAXIMUM = 1e-12
"""The largest magnitude that is assumed for a block with smaller ones; no scale is subnormal."""

EXPONENTS = ("F8_E8M0", "U8")
"""The dtypes of scales that are powers of 2, one byte each: both have the same bytes, exponents plus 127."""
SCALE_DTYPES = ("F32", "BF16", *EXPONENTS)
"""The dtypes of scales by their names in a safetensors header."""


def _encoded(value: Array, *, rows: int, columns: int, scale_dtype: str, power_of_two: bool = False) -> Any:
    """The codes and the scales, which round to F8_E4M3 and are numbers of the scales' dtype.

    A block of zeros has the scale 1. That of a block with a NaN or an infinity is not finite.

    Args:
        value: value of a tensor.
        rows: rows of a block.
        columns: columns of a block.
        scale_dtype: one of `SCALE_DTYPES`.
        power_of_two: whether scales of another dtype are powers of 2, too: each is rounded up to the next one.

    Raises:
        ValueError: the scales' dtype is none of these.
    """
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scales can be stored as {', '.join(SCALE_DTYPES)}, and not as {scale_dtype}")
    value = single(value)
    found = block_max(value, rows, columns)
    # 448 added to a block of zeros makes the scale 1; to others, nothing is added
    largest = single(maximum(found, SMALLEST_MAXIMUM) + LARGEST * (found == 0.0))
    scale = single(largest / LARGEST)
    if power_of_two or scale_dtype in EXPONENTS:
        scale = next_power_of_two(scale)
    elif scale_dtype == "BF16":
        scale = rounded(scale, "bfloat16")
    return clamp(single(value / scale), -LARGEST, LARGEST), scale


def _decoded(codes: Array, scale: Array) -> Array:
    """The value that a reader computes from codes and scales."""
    return rounded(codes, "float8_e4m3fn") * scale


FP8_BLOCKS = Encoder("FP8 encoding", _encoded, 2, _decoded)
"""Parameters: see `_encoded`."""
