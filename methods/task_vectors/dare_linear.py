"""DARE: drop and rescale, with a weighted sum."""

from __future__ import annotations

from ..definition import Array, Base, Inputs, merge_method
from ..parameters import Density, DivisorEps, Lambda, NormalizeAll, Rescale, RescaleEps, Unbiased, Weight
from .common import DARE, restored_norms, task_vectors, weighted_sum
from .sparsify import dropped_at_random


@merge_method("dare_linear", paper=DARE, base=Base.REQUIRED)
def dare_linear(
    t: Inputs,
    *,
    weight: Weight,
    density: Density = (1.0,),
    unbiased: Unbiased = False,
    normalize: NormalizeAll = False,
    rescale: Rescale = True,
    rescale_eps: RescaleEps = 1e-7,
    divisor_eps: DivisorEps = 1e-8,
    lambda_: Lambda = 1.0,
) -> Array:
    """Drop random elements of the task vectors, rescale the rest, and add them to the base.

    d_i = w_i times x_i - base, of which each element is kept with probability density, rescaled to the L1 norm of
    x_i - base. out = base + lambda sum_i d_i
    """
    sparse = dropped_at_random(t, density, unbiased=rescale and unbiased)
    scale = restored_norms(t, task_vectors(t), sparse, rescale_eps) if rescale and not unbiased else None
    return weighted_sum(t, sparse, weight, scale, lambda_=lambda_, normalize=normalize, divisor_eps=divisor_eps)
