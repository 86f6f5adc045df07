"""Numbers of the oracle: how inputs are read, how results are rounded and stored, and what is drawn at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Numbers = np.ndarray[Any, Any]

# --- rounding --------------------------------------------------------------------------------------------------------


def stored(values: Numbers, dtype: torch.dtype) -> bytes:
    """Numbers rounded once, with the canonical NaN of the dtype, as little-endian bytes."""
    if dtype in EIGHT_BITS:
        return _stored_in_eight_bits(values, dtype)
    if dtype is torch.float8_e8m0fnu:
        return _stored_powers(values)
    nearest = rounded(values, dtype)
    nans = np.isnan(nearest)
    nearest = np.where(nans, 0.0, nearest)
    if dtype is torch.float64:
        bits, nan = nearest.view(np.uint64), np.uint64(0x7FF8_0000_0000_0000)
    elif dtype is torch.float16:
        bits, nan = nearest.astype(np.float16).view(np.uint16), np.uint16(0x7E00)
    else:
        bits, nan = nearest.astype(np.float32).view(np.uint32), np.uint32(0x7FC0_0000)
    bits = np.where(nans, nan, bits)
    return (bits >> np.uint32(16)).astype(np.uint16).tobytes() if dtype is torch.bfloat16 else bits.tobytes()


EIGHT_BITS = {
    torch.float8_e4m3fn: 0x7F,
    torch.float8_e5m2: 0x7F,
    torch.float8_e4m3fnuz: 0x80,
    torch.float8_e5m2fnuz: 0x80,
}
"""The canonical NaN of the formats of 8 bits."""


def _stored_in_eight_bits(values: Numbers, dtype: torch.dtype) -> bytes:
    """The nearest of the format's numbers, found among all of them; of two equally near ones, the one with even bits.

    Numbers that are nearer to the number after the largest one become infinite, or NaN in a format without infinities.
    """
    codes = np.arange(256, dtype=np.uint8)
    table = torch.from_numpy(codes).view(dtype).to(torch.float64).numpy()
    finite = codes[np.isfinite(table)]
    finite = finite[np.argsort(table[finite], kind="stable")]
    finite = finite[~((table[finite] == 0) & (finite != 0))]  # +0; the sign of a 0 is set below
    numbers = table[finite]
    following = 2 * numbers[-1] - numbers[-2]
    wide = np.array(values, dtype=np.float64).reshape(-1)
    kept = np.nan_to_num(wide, nan=0.0, posinf=4 * following, neginf=-4 * following)
    grid = np.concatenate([[-following], numbers, [following]])
    place = np.clip(np.searchsorted(grid, kept), 1, len(grid) - 1)
    below, above = kept - grid[place - 1], grid[place] - kept
    even = np.concatenate([[False], finite % 2 == 0, [False]])
    even[[0, -1]] = not even[1]
    chosen = np.where((below < above) | ((below == above) & even[place - 1]), place - 1, place)
    beyond = (chosen == 0) | (chosen == len(grid) - 1)
    result = finite[np.clip(chosen - 1, 0, len(finite) - 1)]
    if np.isinf(table).any():
        infinity = codes[np.isinf(table) & (codes < 128)][0]
        result = np.where(beyond, np.where(kept < 0, infinity | 0x80, infinity), result)
    else:
        result = np.where(beyond, EIGHT_BITS[dtype], result)
    if np.signbit(table[0x80]) and table[0x80] == 0:
        result = np.where((result == 0) & np.signbit(wide), 0x80, result)
    return np.where(np.isnan(wide), EIGHT_BITS[dtype], result).astype(np.uint8).tobytes()


def _stored_powers(values: Numbers) -> bytes:
    """The nearest power of 2 from 2^-127 to 2^127; of two equally near ones, the one with the even code."""
    powers = np.ldexp(1.0, np.arange(-127, 129))  # the last one is beyond
    wide = np.array(values, dtype=np.float64).reshape(-1)
    kept = np.where(wide > 0, np.minimum(wide, powers[-1]), 1.0)
    above = np.clip(np.searchsorted(powers, kept), 1, len(powers) - 1)
    up, down = powers[above] - kept, kept - powers[above - 1]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)
    code = np.where(kept <= powers[0], 0, code)
    code = np.where((wide == 0) & ~np.signbit(wide), 0, code)
    return np.where(np.isnan(wide) | np.signbit(wide), 255, code).astype(np.uint8).tobytes()


def rounded(values: Numbers, dtype: torch.dtype) -> Numbers:
    """The nearest numbers of a dtype as float64; of two equally near ones, the one whose last bit is 0."""
    with np.errstate(all="ignore"):
        wide = np.array(values, dtype=np.float64)
    if dtype is torch.float64:
        return wide
    precision, lowest, beyond = {
        torch.bfloat16: (8, -133, 128),
        torch.float16: (11, -24, 16),
        torch.float32: (24, -149, 128),
    }[dtype]
    with np.errstate(all="ignore"):
        _, exponents = np.frexp(wide)
        last = np.maximum(exponents - precision, lowest)  # exponent of a unit in the last place
        nearest = np.ldexp(np.rint(np.ldexp(wide, -last)), last)
    nearest = np.where(np.isfinite(wide), nearest, wide)
    return np.where(np.abs(nearest) >= 2.0**beyond, np.copysign(np.inf, nearest), nearest)


def loaded(tensor: torch.Tensor, work: Any) -> Numbers:
    """The values of an input in the work dtype, which is exact."""
    if tensor.dtype is torch.float8_e8m0fnu:
        exponents = tensor.contiguous().view(torch.uint8).numpy()
        powers: Numbers = np.where(exponents == 255, np.nan, np.ldexp(1.0, exponents.astype(np.int32) - 127)).astype(
            work
        )
        return powers
    if tensor.dtype in EIGHT_BITS:
        decoded: Numbers = tensor.to(torch.float32).numpy().astype(work)
        return decoded
    if tensor.dtype is torch.bfloat16:
        bits = tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(work)
    return tensor.numpy().astype(work)


# --- random numbers --------------------------------------------------------------------------------------------------


def hashes(key: int, position: int, indices: Numbers) -> Numbers:
    """The hash of each element's index as uint32.

    lowbias32(i * step + low half of s), with the high half of s added between the two rounds, where s is a splitmix64
    hash of the key, the position and the high half of i.
    """
    low, high = indices.astype(np.uint64) & _LOW, indices.astype(np.uint64) >> np.uint64(32)
    result = np.zeros(indices.shape, dtype=np.uint32)
    for period in np.unique(high):
        seed = _splitmix(_splitmix(_splitmix(key) + position) + int(period))
        x = (low * np.uint64(0x9E37_79B1) + np.uint64(seed & 0xFFFF_FFFF)) & _LOW
        x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB_352D) + np.uint64(seed >> 32)) & _LOW
        x = ((x ^ (x >> np.uint64(15))) * np.uint64(0x846C_A68B)) & _LOW
        x = x ^ (x >> np.uint64(16))
        result = np.where(high == period, x.astype(np.uint32), result)
    return result


_LOW = np.uint64(0xFFFF_FFFF)


def _splitmix(x: int) -> int:
    """The output of splitmix64 for a state."""
    limit = 1 << 64
    x = (x + 0x9E37_79B9_7F4A_7C15) % limit
    x = (x ^ (x >> 30)) * 0xBF58_476D_1CE4_E5B9 % limit
    x = (x ^ (x >> 27)) * 0x94D0_49BB_1331_11EB % limit
    return x ^ (x >> 31)
