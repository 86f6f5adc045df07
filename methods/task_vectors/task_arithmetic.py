"""Task arithmetic."""

from __future__ import annotations

from ..definition import Array, Base, Inputs, merge_method
from ..parameters import DivisorEps, Lambda, NormalizeAll, Weight
from .common import TASK_ARITHMETIC, task_vectors, weighted_sum


@merge_method("task_arithmetic", paper=TASK_ARITHMETIC, base=Base.REQUIRED)
def task_arithmetic(
    t: Inputs,
    *,
    weight: Weight,
    normalize: NormalizeAll = False,
    rescale: bool = False,
    divisor_eps: DivisorEps = 1e-8,
    lambda_: Lambda = 1.0,
) -> Array:
    """The base plus the weighted sum of the task vectors.

    out = base + lambda sum_i w_i (x_i - base)

    Args:
        rescale: has no effect, because this method drops no elements.
    """
    vectors = task_vectors(t)
    return weighted_sum(t, vectors, weight, lambda_=lambda_, normalize=normalize, divisor_eps=divisor_eps)
