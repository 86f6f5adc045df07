"""DELLA without the sign election."""

from __future__ import annotations

from ..definition import Array, Base, Inputs, merge_method
from ..parameters import Density, DivisorEps, Epsilon, Lambda, NormalizeAll, Rescale, RescaleEps, Unbiased, Weight
from .common import DELLA, restored_norms, task_vectors, weighted_sum
from .sparsify import pruned_by_rank


@merge_method("della_linear", paper=DELLA, base=Base.REQUIRED)
def della_linear(
    t: Inputs,
    *,
    weight: Weight,
    density: Density = (1.0,),
    epsilon: Epsilon = (0.15,),
    unbiased: Unbiased = False,
    normalize: NormalizeAll = False,
    rescale: Rescale = True,
    rescale_eps: RescaleEps = 1e-7,
    divisor_eps: DivisorEps = 1e-8,
    lambda_: Lambda = 1.0,
) -> Array:
    """Drop random elements of the task vectors, preferably small ones, rescale, and add them to the base.

    As dare_linear, with the probabilities of della.
    """
    sparse = pruned_by_rank(t, density, epsilon, unbiased=rescale and unbiased)
    scale = restored_norms(t, task_vectors(t), sparse, rescale_eps) if rescale and not unbiased else None
    return weighted_sum(t, sparse, weight, scale, lambda_=lambda_, normalize=normalize, divisor_eps=divisor_eps)
