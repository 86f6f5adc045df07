"""DARE with the sign election of TIES."""

from __future__ import annotations

from ..definition import Array, Base, Inputs, merge_method
from ..parameters import Density, Lambda, NormalizeAgreeing, Rescale, RescaleEps, Unbiased, Weight
from .common import DARE, elected_sum, restored_norms, task_vectors
from .sparsify import dropped_at_random


@merge_method("dare_ties", paper=DARE, base=Base.REQUIRED)
def dare_ties(
    t: Inputs,
    *,
    weight: Weight,
    density: Density = (1.0,),
    unbiased: Unbiased = False,
    normalize: NormalizeAgreeing = False,
    rescale: Rescale = True,
    rescale_eps: RescaleEps = 1e-7,
    lambda_: Lambda = 1.0,
) -> Array:
    """Drop random elements of the task vectors, rescale the rest, and add the values that agree with the elected sign.

    d_i as in dare_linear, the elected sign as in ties. out = base + lambda (sum of the d_i with that sign)
    """
    sparse = dropped_at_random(t, density, unbiased=rescale and unbiased)
    scale = restored_norms(t, task_vectors(t), sparse, rescale_eps) if rescale and not unbiased else None
    return elected_sum(t, sparse, weight, scale, lambda_=lambda_, normalize=normalize)
