"""The vocabulary of merge methods in combinations that once failed: the oracle's bytes, or an error by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mergeloom.methods import Array, Inputs, add, exp, host, log, maximum, minimum, single, sqrt, where, wide
from tests.support.methods import oracle
from tests.support.methods.kernels import kernel_of, run_kernel

ZERO = 0.0
"""A factor of 0, for which an array becomes the constant 0 when the method is traced."""


def total_if_positive(t: Inputs) -> Array:
    total = t.sum(t.other)
    return t.other + where(total > 0, total, 1.0)


def column_moments(t: Inputs) -> Array:
    """Two sums of one array in float64, the first of which must not change it."""
    x = wide(t.other)
    return t.other + t.column_sum(x) - t.column_sum(x * x)


EXPRESSIONS: dict[str, Callable[[Inputs], Array]] = {
    "arithmetic on columns": lambda t: t.other - t.column_sum(t.other) / 3.0,
    "a column and a scalar": lambda t: t.other * (t.column_sum(t.other) / t.sum(abs(t.other))),
    "functions of columns": lambda t: t.other * exp(-sqrt(abs(t.column_sum(t.other)))),
    "a comparison of columns": lambda t: where(t.column_sum(t.other) > 0, t.other, -1.0),
    "the minimum of an array and columns": lambda t: minimum(t.other, t.column_sum(t.other)),
    "rows and columns": lambda t: t.row_sum(t.other) * t.column_sum(t.other),
    "two sums of columns": column_moments,
    "exp of a scalar": lambda t: t.other * exp(t.sum(t.other) / t.size),
    "log of a scalar": lambda t: t.other * log(t.count(t.other > 0)),
    "exp of a constant": lambda t: t.other * exp(t.origin),
    "a scalar in float32": lambda t: t.other + host(lambda s: s * 1e8 % 1.0, single(t.sum(t.other))),
    "a comparison of scalars": total_if_positive,
    "the largest, with zeros": lambda t: where(t.largest(t.other, t.size - 3), 1.0, 2.0),
    "the count of the largest": lambda t: t.other + t.count(t.largest(t.other * (t.other > 0), t.size - 3)),
    "the largest of what depends on columns": lambda t: t.other * t.largest(t.other - t.column_sum(t.other), 50),
    "ranks of NaNs": lambda t: t.row_rank(t.other),
    "the sum of 0 x plus a scalar": lambda t: t.other + t.sum(ZERO * t.other + t.sum(t.other)),
    "the count of 0 x above a scalar": lambda t: t.other + t.count(ZERO * t.other > t.sum(t.other)),
    "the largest of 0 x": lambda t: t.other * t.largest(ZERO * t.other, 50),
    "the k-th largest of 0 x": lambda t: t.other + t.kth_largest(ZERO * t.other + 2.0, 50),
    "rows of 0 x": lambda t: t.row_sum(ZERO * t.other + 2.0) * t.row_max(ZERO * t.other) - t.row_rank(ZERO * t.other),
    "columns of 0 x": lambda t: t.other * t.column_sum(ZERO * t.other + 2.0),
    "a limit that float32 rounds to 0": lambda t: maximum(ZERO - minimum(t.other, 0.0), 1e-50),
}


def values(shape: tuple[int, ...], *, finite: bool) -> Tensor:
    """Normal numbers, a third of them 0, and if wanted NaNs with different payloads and an infinity."""
    generator = np.random.default_rng(5)
    x = (generator.standard_normal(shape) * (generator.random(shape) < 2 / 3)).astype(np.float32)
    x.reshape(-1)[::11] = -0.0
    if not finite:
        x.reshape(-1).view(np.uint32)[5:9] = 0x7FC0_0001, 0xFFC0_0000, 0x7FC0_0000, 0x7F80_0000
    return torch.from_numpy(x)


@pytest.mark.parametrize("shape", [(1001, 131), (40, 3, 5), (70_001,)], ids=str)
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression(name: str, finite: bool, shape: tuple[int, ...]) -> None:
    inputs = [values(shape, finite=finite)]
    kernel = kernel_of(EXPRESSIONS[name], 1, None, shape)
    wanted = oracle.stored(oracle.evaluate(kernel, inputs), torch.float32)
    for tile in (None, 1 << 15):
        assert oracle.stored(run_kernel(kernel, inputs, tile).output.numpy(), torch.float32) == wanted


def test_columns_in_float64() -> None:
    """Several lists of columns in one tile are not mixed up."""
    inputs = [values((40, 64), finite=True).double() * factor for factor in (1, 2, 3, 4)]
    kernel = kernel_of(lambda t: add([t.column_sum(x) * x for x in t.models]), 4, None, (40, 64))
    wanted = sum((x.sum(0).float() * x for x in inputs), torch.zeros(40, 64, dtype=torch.float64))
    assert torch.allclose(run_kernel(kernel, inputs).output, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda t, s: where(s > 0, 1.0, 2.0), 2.0),
        (lambda t, s: where(s != s, 1.0, 2.0), 1.0),
        (lambda t, s: where(s > 0, s, 3.0), 3.0),
        (lambda t, s: 0.0 * t.other + where(~((s > 0) | (s <= 0)), 4.0, s), 4.0),
        (lambda t, s: maximum(1.0 / s, -5.0), math.nan),
        (lambda t, s: 1.0 / (t.count(t.other == 1) - 1.0), math.inf),
    ],
)
@pytest.mark.parametrize("reduce", ["sum", "column_sum"])
def test_scalars_and_columns_that_are_not_finite(
    function: Callable[[Inputs, Array], Array], wanted: float, reduce: str
) -> None:
    """Comparisons with NaN are false except `!=`, and what `where` does not choose is lost."""
    kernel = kernel_of(lambda t: 0.0 * t.other + function(t, getattr(t, reduce)(t.other)), 1, None, (2, 1))
    found = run_kernel(kernel, [torch.tensor([[math.nan], [1.0]])]).output
    assert found.flatten().tolist() == pytest.approx([wanted] * 2, nan_ok=True)


@pytest.mark.parametrize(
    ("x", "wanted"), [(2.0**-1022, -1022 * math.log(2)), (2.0**-1023, math.nan), (0.0, math.nan), (math.inf, math.nan)]
)
def test_log_is_of_normal_numbers(x: float, wanted: float) -> None:
    tensor = torch.tensor([x], dtype=torch.float64)
    for function in (lambda t: log(t.other), lambda t: log(t.column_sum(t.other)) + 0.0 * t.other):
        found = float(run_kernel(kernel_of(function, 1, None, (1,)), [tensor]).output)
        assert found == pytest.approx(wanted, nan_ok=True)
