"""Model Breadcrumbs: without outliers and without small values."""

from __future__ import annotations

from ..definition import Array, Base, Inputs, merge_method
from ..parameters import Density, DivisorEps, Gamma, Lambda, NormalizeAll, Rescale, RescaleEps, Weight
from .common import BREADCRUMBS, restored_norms, task_vectors, weighted_sum
from .sparsify import without_outliers


@merge_method("breadcrumbs", paper=BREADCRUMBS, base=Base.REQUIRED)
def breadcrumbs(
    t: Inputs,
    *,
    weight: Weight,
    density: Density = (1.0,),
    gamma: Gamma = (0.01,),
    normalize: NormalizeAll = False,
    rescale: Rescale = False,
    rescale_eps: RescaleEps = 1e-7,
    divisor_eps: DivisorEps = 1e-8,
    lambda_: Lambda = 1.0,
) -> Array:
    """Drop the largest and the smallest elements of the task vectors, and add the rest to the base.

    d_i = w_i times x_i - base without its gamma n largest elements, and without the smallest, which leaves density n
    of n. out = base + lambda sum_i d_i
    """
    sparse = without_outliers(t, density, gamma)
    scale = restored_norms(t, task_vectors(t), sparse, rescale_eps) if rescale else None
    return weighted_sum(t, sparse, weight, scale, lambda_=lambda_, normalize=normalize, divisor_eps=divisor_eps)
