"""The operations of expression graphs in torch: only those that round exactly, on every device.

torch does not round everything exactly: a square root in float32 can be wrong in the last bit, ``add(alpha=)``,
``addcmul`` and ``lerp`` can be contracted to a fused multiply-add, and ``maximum(+0, -0)`` returns either sign. So only
additions, subtractions, multiplications and divisions of two tensors, bit operations, comparisons, ``where`` and casts
are used here; constants are 0-d tensors on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .block_sums import pairwise_fold

_NAN = 0x7FC0_0000  # as float32

Operation = Callable[..., object]
"""``operation(out, *args, *scratch)`` computes a node into `out`."""


def _square_root(out: Tensor, a: Tensor, work: Tensor) -> None:
    work.copy_(a)
    if work.device.type == "cpu":  # torch can use a vector library that does not round correctly
        with np.errstate(invalid="ignore"):  # of a negative number; the result is NaN
            np.sqrt(work.numpy(), out=work.numpy())
    else:
        torch.sqrt(work, out=work)
    out.copy_(work)  # rounding a float64 root to float32 is exact (Figueroa, 1995)


def _minimum(out: Tensor, a: Tensor, b: Tensor, flags: Tensor) -> None:
    torch.where(torch.lt(b, a, out=flags), b, a, out=out)


def _maximum(out: Tensor, a: Tensor, b: Tensor, flags: Tensor) -> None:
    torch.where(torch.gt(b, a, out=flags), b, a, out=out)


def _next_power(out: Tensor, a: Tensor) -> None:
    integers, mantissa = (torch.int64, (1 << 52) - 1) if a.dtype is torch.float64 else (torch.int32, (1 << 23) - 1)
    powers = (
        a.view(integers).add(mantissa).bitwise_and_(-mantissa - 1).view(a.dtype)
    )  # a significand other than 0 carries
    torch.where(torch.eq(a, a), powers, a, out=out)


def _row_sum(out: Tensor, a: Tensor, work: Tensor) -> None:
    out.copy_(pairwise_fold(work.copy_(a)))


def _row_max(out: Tensor, a: Tensor) -> None:
    torch.amax(a, dim=1, keepdim=True, out=out).add_(0.0)  # -0 becomes +0


def _row_rank(out: Tensor, a: Tensor, keys: Tensor) -> None:
    columns = torch.arange(a.shape[1], dtype=torch.int64, device=a.device)
    keys.copy_(a.to(torch.float32).view(torch.int32)).clamp_(max=_NAN)  # one key for all NaNs
    keys.bitwise_left_shift_(32).bitwise_or_(columns)  # keys are unique, so any sort is stable
    if keys.device.type == "cpu":
        keys.numpy().sort(axis=1)  # several times faster than torch.sort
    else:
        keys.copy_(torch.sort(keys, dim=1).values)
    keys.bitwise_and_((1 << 32) - 1)
    out.scatter_(1, keys, columns.to(out.dtype).expand_as(out))


def _fraction(out: Tensor, a: Tensor) -> None:
    a.bitwise_right_shift_(8).bitwise_and_(0xFF_FFFF)
    out.copy_(a).mul_(2.0**-24)  # exact


OPERATIONS: Mapping[str, Operation] = {
    "add": lambda out, a, b: torch.add(a, b, out=out),
    "sub": lambda out, a, b: torch.sub(a, b, out=out),
    "mul": lambda out, a, b: torch.mul(a, b, out=out),
    "div": lambda out, a, b: torch.div(a, b, out=out),
    "neg": lambda out, a: torch.neg(a, out=out),
    "abs": lambda out, a: torch.abs(a, out=out),
    "sqrt": _square_root,
    "minimum": _minimum,
    "maximum": _maximum,
    "gt": lambda out, a, b: torch.gt(a, b, out=out),
    "ge": lambda out, a, b: torch.ge(a, b, out=out),
    "lt": lambda out, a, b: torch.lt(a, b, out=out),
    "le": lambda out, a, b: torch.le(a, b, out=out),
    "eq": lambda out, a, b: torch.eq(a, b, out=out),
    "ne": lambda out, a, b: torch.ne(a, b, out=out),
    "and": lambda out, a, b: torch.logical_and(a, b, out=out),
    "or": lambda out, a, b: torch.logical_or(a, b, out=out),
    "not": lambda out, a: torch.logical_not(a, out=out),
    "where": lambda out, c, a, b: torch.where(c, a, b, out=out),
    "number": lambda out, a: out.copy_(a),
    "fill": lambda out, a: out.copy_(a.expand_as(out)),
    "wide": lambda out, a: out.copy_(a),
    "narrow": lambda out, a: out.copy_(a),
    "single": lambda out, a: out.copy_(a.to(torch.float32)),
    "to_wide": lambda out, a: out.copy_(a),
    "bits": lambda out, a: out.copy_(a.view(torch.int64)),
    "from_bits": lambda out, a: out.copy_(a.view(torch.float64)),
    "fraction": _fraction,
    "next_power": _next_power,
    "row_sum": _row_sum,
    "row_max": _row_max,
    "row_rank": _row_rank,
}

INTEGER_OPERATIONS: Mapping[str, Callable[[Tensor, Tensor, int], Any]] = {
    "iadd": lambda out, a, value: torch.add(a, value, out=out),
    "iand": lambda out, a, value: torch.bitwise_and(a, value, out=out),
    "ior": lambda out, a, value: torch.bitwise_or(a, value, out=out),
    "ishl": lambda out, a, value: torch.bitwise_left_shift(a, value, out=out),
    "ishr": lambda out, a, value: torch.bitwise_right_shift(a, value, out=out),
}
