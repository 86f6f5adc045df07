"""TIES: trim, elect signs, merge."""

from __future__ import annotations

from ..definition import Array, Base, Inputs, merge_method
from ..parameters import Density, Lambda, NormalizeAgreeing, Rescale, RescaleEps, Weight
from .common import TIES, elected_sum, restored_norms, task_vectors
from .sparsify import trimmed


@merge_method("ties", paper=TIES, base=Base.REQUIRED)
def ties(
    t: Inputs,
    *,
    weight: Weight,
    density: Density = (1.0,),
    normalize: NormalizeAgreeing = True,
    rescale: Rescale = False,
    rescale_eps: RescaleEps = 1e-7,
    lambda_: Lambda = 1.0,
) -> Array:
    """Trim the task vectors, elect a sign for each element, and average the values that agree with it.

    d_i = w_i times the largest elements of x_i - base, with the others set to 0. The elected sign of an element is the
    sign of sum_i d_i, or plus if the sum is 0. out = base + lambda (sum of the d_i with that sign) / (sum of their
    w_i), without the division if `normalize` is false. The paper trims the model as one vector.
    """
    sparse = trimmed(t, density)
    scale = restored_norms(t, task_vectors(t), sparse, rescale_eps) if rescale else None
    return elected_sum(t, sparse, weight, scale, lambda_=lambda_, normalize=normalize)
