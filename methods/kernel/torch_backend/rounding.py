"""Rounding of results to the output's dtype: once, and with one NaN."""

from __future__ import annotations

import torch
from torch import Tensor


def round_into(out: Tensor, values: Tensor) -> Tensor:
    """Round values once to the dtype of `out`; return the smallest and the largest of them, or NaN.

    torch converts float64 to types narrower than float32 through float32, which rounds twice. Rounding to float32 with
    "round to odd" first gives the same result as rounding once (Boldo and Melquiond, 2008). Every NaN becomes the
    dtype's canonical NaN.
    """
    extremes = torch.stack([values.amin(), values.amax()])
    if values.dtype == torch.float64 and out.dtype.itemsize < 4:
        nearest = values.to(torch.float32)
        back = nearest.to(torch.float64)
        bits = nearest.view(torch.int32)
        inexact = ((back != values) & torch.isfinite(values)).to(torch.int32)
        away = (back.abs() > values.abs()).to(torch.int32) * inexact
        values = ((bits - away) | inexact).view(torch.float32)
    if out.dtype is torch.float8_e8m0fnu:
        out.view(torch.uint8).copy_(_nearest_powers(values))
    else:
        out.copy_(values)
    return extremes


def _nearest_powers(values: Tensor) -> Tensor:
    """The codes of float32 numbers rounded to the nearest power of 2; NaN for those with a sign.

    torch's own conversion drops the sign.
    """
    bits = values.to(torch.float32).view(torch.int32)
    codes = (bits + ((1 << 22) - 1) + ((bits >> 23) & 1)) >> 23
    codes = torch.where(bits < 1 << 23, (bits > 3 << 21).to(torch.int32), codes)  # the smallest power is subnormal
    return torch.where((bits < 0) | (bits > 0xFF << 23), 0xFF, codes)


def canonical_nans(out: Tensor) -> None:
    """Replace every NaN by the canonical one of the dtype: positive and quiet, without a payload."""
    numbers = out if out.dtype.itemsize > 1 else out.to(torch.float32)
    nans = numbers != numbers
    if out.dtype.itemsize == 1:  # torch cannot fill FP8 by a mask
        out.view(torch.uint8).masked_fill_(nans, _CANONICAL[out.dtype])
    else:
        out.masked_fill_(nans, float("nan"))


_CANONICAL = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7F, torch.float8_e8m0fnu: 0xFF}
