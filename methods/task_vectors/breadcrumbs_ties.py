"""Model Breadcrumbs with the sign election of TIES."""

from __future__ import annotations

from ..definition import Array, Base, Inputs, merge_method
from ..parameters import Density, Gamma, Lambda, NormalizeAgreeing, Rescale, RescaleEps, Weight
from .common import BREADCRUMBS, elected_sum, restored_norms, task_vectors
from .sparsify import without_outliers


@merge_method("breadcrumbs_ties", paper=BREADCRUMBS, base=Base.REQUIRED)
def breadcrumbs_ties(
    t: Inputs,
    *,
    weight: Weight,
    density: Density = (1.0,),
    gamma: Gamma = (0.01,),
    normalize: NormalizeAgreeing = False,
    rescale: Rescale = False,
    rescale_eps: RescaleEps = 1e-7,
    lambda_: Lambda = 1.0,
) -> Array:
    """Drop the largest and smallest elements of the task vectors, and add the values that agree with the elected sign.

    d_i as in breadcrumbs, the elected sign as in ties. out = base + lambda (sum of the d_i with that sign)
    """
    sparse = without_outliers(t, density, gamma)
    scale = restored_norms(t, task_vectors(t), sparse, rescale_eps) if rescale else None
    return elected_sum(t, sparse, weight, scale, lambda_=lambda_, normalize=normalize)
