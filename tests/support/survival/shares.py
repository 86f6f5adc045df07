"""What rounding keeps of a change, computed in float64 from files, with a bound of the difference from float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_UNIT = 2.0**-24


def decoded(tensors: Mapping[str, Tensor], block: tuple[int, int] | None) -> dict[str, Tensor]:
    """The values that a reader computes from codes and scales in float64, by the names of the codes.

    Args:
        tensors: stored tensors.
        block: rows and columns of a block; None for rows.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float8_e4m3fn:
            found[name] = tensor.double()
            continue
        module = name.removesuffix(".weight")
        endings = ("weight_scale_inv", "weight_scale", "scale")
        scales = next(tensors[f"{module}.{each}"] for each in endings if f"{module}.{each}" in tensors).double()
        if any(tensors.get(f"{module}.{each}", scales).dtype == torch.uint8 for each in endings):
            scales = torch.exp2(scales - 127)
        rows, columns = block or (1, tensor.shape[1])
        wide = scales.view(-1, -(-tensor.shape[1] // columns)).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        found[name] = tensor.double() * wide[: tensor.shape[0], : tensor.shape[1]]
    return found


def bounded_share(stored: Tensor, base: Tensor, other: Tensor, weight: float) -> tuple[float, float]:
    """The share that rounding keeps of a step of task_arithmetic with one model, and a bound of its error in float32.

    The step is computed with the weight in float32. In float32, a value differs from that of float64 by a rounding of
    its difference, its product and its sum; each difference and product of the share's sums is rounded, too, and each
    of their totals is a sum of at most the rows of a block of 128 rows or 2^15 elements.

    Args:
        stored: values that a reader has.
        base: values of the base.
        other: values of the model.
        weight: its weight.
    """
    q, b, x = stored.double(), base.double(), other.double()
    w = float(torch.tensor(weight, dtype=torch.float32))
    step = w * (x - b)
    error = _UNIT * (2 * step.abs() + (b + step).abs()) * 1.01  # of v
    read = _UNIT * q.abs()  # of the product of code and scale
    change, kept = step, q - b
    terms = min(b.shape[0], max(128, 2**15 // b.shape[-1] + 1)) + 4

    def sum_error(first: Tensor, second: Tensor, off_first: Tensor, off_second: Tensor) -> float:
        exact = (first.abs() * off_second + second.abs() * off_first + off_first * off_second).sum()
        return float(exact + terms * _UNIT * ((first.abs() + off_first) * (second.abs() + off_second)).sum())

    top, bottom = float((kept * change).sum()), float((change * change).sum())
    off_top, off_bottom = sum_error(kept, change, read, error), sum_error(change, change, error, error)
    return top / bottom, (off_top + abs(top / bottom) * off_bottom) / (bottom - off_bottom)
