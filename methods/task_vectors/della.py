"""DELLA: drop by rank at random, elect signs, fuse."""

from __future__ import annotations

from ..definition import Array, Base, Inputs, merge_method
from ..parameters import Density, Epsilon, Lambda, NormalizeAgreeing, Rescale, RescaleEps, Unbiased, Weight
from .common import DELLA, elected_sum, restored_norms, task_vectors
from .sparsify import pruned_by_rank


@merge_method("della", paper=DELLA, base=Base.REQUIRED)
def della(
    t: Inputs,
    *,
    weight: Weight,
    density: Density = (1.0,),
    epsilon: Epsilon = (0.15,),
    unbiased: Unbiased = False,
    normalize: NormalizeAgreeing = True,
    rescale: Rescale = True,
    rescale_eps: RescaleEps = 1e-7,
    lambda_: Lambda = 1.0,
) -> Array:
    """Drop random elements of the task vectors, preferably small ones, rescale, and average the values that agree.

    Drop: keep an element of x_i - base with probability p = density - epsilon + 2 epsilon r / (c-1), where r is the
    rank of its magnitude in its row of c elements, from 0 for the smallest. d_i = w_i times the result, rescaled.
    Elect and fuse: as ties. out = base + lambda (sum of the d_i with the elected sign) / (sum of their w_i)
    """
    sparse = pruned_by_rank(t, density, epsilon, unbiased=rescale and unbiased)
    scale = restored_norms(t, task_vectors(t), sparse, rescale_eps) if rescale and not unbiased else None
    return elected_sum(t, sparse, weight, scale, lambda_=lambda_, normalize=normalize)
