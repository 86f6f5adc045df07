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

    As dare_ties, but the probability of keeping an element rises from density - epsilon to density + epsilon with the
    rank of its absolute value in its row, and the sum is divided by the weights.
    """
    sparse = pruned_by_rank(t, density, epsilon, unbiased=rescale and unbiased)
    scale = restored_norms(t, task_vectors(t), sparse, rescale_eps) if rescale and not unbiased else None
    return elected_sum(t, sparse, weight, scale, lambda_=lambda_, normalize=normalize)
