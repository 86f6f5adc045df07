"""Compares a merged model with what the recipe evaluates to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.methods.reference import Expected
from tests.support.outputs import same_bits
from tests.support.published.evaluate import Evaluated

STEP = 2.0**-23
"""The relative rounding of float32, in which mergeloom computes."""


@dataclass
class Difference:
    """How far a model is from the reference.

    Args:
        ulp: largest distance from the closest valid value, in ulp of the output's dtype at that value.
        exact: whether all tensors are the correctly rounded reference.
    """

    ulp: float = 0.0
    exact: bool = True


def ulp_at(values: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of a dtype at float64 values."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.tiny))[1] - 1
    return torch.ldexp(torch.full_like(values, info.eps), exponent)


def compare(found: Mapping[str, Tensor], wanted: Evaluated) -> Difference:
    """Compare every tensor of a model with the reference.

    An element may differ from a valid value by one ulp of the output's dtype, and by the rounding errors of float32
    terms that cancel.

    Raises:
        AssertionError: a tensor is missing, unexpected, or has other values.
    """
    assert found.keys() == wanted.tensors.keys()
    result = Difference()
    for name, tensor in found.items():
        reference = wanted.tensors[name]
        if isinstance(reference, Tensor):
            assert same_bits(tensor, reference), name
            continue
        assert tensor.dtype == wanted.dtype, name
        _compare_values(name, tensor, reference, result)
    return result


def _compare_values(name: str, tensor: Tensor, reference: Expected, result: Difference) -> None:
    first = reference.outputs[0]
    assert tensor.shape == first.shape, name
    if torch.equal(tensor, first.to(tensor.dtype)):
        return
    result.exact = False
    values = tensor.to(torch.float64)
    best = torch.full_like(values, torch.inf)
    fits = torch.zeros_like(values, dtype=torch.bool)
    for candidate in reference.outputs:
        unit = ulp_at(candidate, tensor.dtype)
        distance = (values - candidate).abs()
        fits |= distance <= unit + 16 * STEP * reference.size
        best = torch.minimum(best, distance / unit)
    assert bool(fits.all()), (
        f"{name}: {int((~fits).sum())} of {fits.numel()} values differ, by up to {float(best.max())} ulp"
    )
    result.ulp = max(result.ulp, float(best.max()))
