"""The task-vector methods: task arithmetic, TIES, DARE, DELLA and Model Breadcrumbs."""

from __future__ import annotations

from collections.abc import Sequence

from .kernel.contract import Base, Finite, Fraction, HalfWidth, Inputs, Kernel, NonNegative, PerInput, merge_method
from .sparsify import Bernoulli, MagPrune, drop_outliers, top_k
from .task_vectors import Sparsifier, TaskVectors

TASK_ARITHMETIC = "https://arxiv.org/abs/2212.04089"
TIES = "https://arxiv.org/abs/2306.01708"
DARE = "https://arxiv.org/abs/2311.03099"
DELLA = "https://arxiv.org/abs/2406.11617"
BREADCRUMBS = "https://arxiv.org/abs/2312.06795"


def weighted_deltas(
    inputs: Inputs,
    sparsifier: Sparsifier,
    *,
    weight: Sequence[float],
    lambda_: float,
    rescale_eps: float | None,
    divisor_eps: float | None,
) -> Kernel:
    """The base plus lambda times the weighted sum of the sparse task vectors.

    Args:
        inputs: inputs of the output tensor.
        sparsifier: makes each task vector sparse.
        weight: weight of each input.
        lambda_: factor of the sum.
        rescale_eps: smallest L1 norm that is restored; None to restore none.
        divisor_eps: smallest sum of weights to divide by; None to skip the division.
    """
    normalize = divisor_eps is not None
    return TaskVectors(
        inputs,
        sparsifier,
        weight=weight,
        elect=False,
        normalize=normalize,
        rescale_eps=rescale_eps,
        divisor_eps=divisor_eps or 0.0,
        factor=lambda_,
    )


def elected_deltas(
    inputs: Inputs,
    sparsifier: Sparsifier,
    *,
    weight: Sequence[float],
    lambda_: float,
    rescale_eps: float | None,
    normalize: bool,
) -> Kernel:
    """As `weighted_deltas`, but each element sums only the task vectors that have the elected sign there."""
    return TaskVectors(
        inputs,
        sparsifier,
        weight=weight,
        elect=True,
        normalize=normalize,
        rescale_eps=rescale_eps,
        divisor_eps=0.0,
        factor=lambda_,
    )


@merge_method("task_arithmetic", paper=TASK_ARITHMETIC, base=Base.REQUIRED)
def task_arithmetic(
    inputs: Inputs,
    *,
    weight: PerInput[Finite],
    normalize: bool = False,
    rescale: bool = False,
    divisor_eps: NonNegative = 1e-8,
    lambda_: Finite = 1.0,
) -> Kernel:
    """The base plus the weighted sum of the task vectors.

    out = base + lambda sum_i w_i (x_i - base)

    Args:
        weight: weight of this model's task vector.
        normalize: divide by the sum of all weights, unless its absolute value is below `divisor_eps`.
        rescale: has no effect, because this method drops no elements.
        divisor_eps: smallest sum of weights (absolute value) to divide by.
        lambda_: factor of the sum before it is added to the base.
    """
    divisor = divisor_eps if normalize else None
    return weighted_deltas(
        inputs, Sparsifier(inputs), weight=weight, lambda_=lambda_, rescale_eps=None, divisor_eps=divisor
    )


@merge_method("ties", paper=TIES, base=Base.REQUIRED)
def ties(
    inputs: Inputs,
    *,
    weight: PerInput[Finite],
    density: PerInput[Fraction] = (1.0,),
    normalize: bool = True,
    rescale: bool = False,
    rescale_eps: NonNegative = 1e-7,
    lambda_: Finite = 1.0,
) -> Kernel:
    """Trim the task vectors, elect a sign for each element, and average the values that agree with it.

    d_i = w_i times the largest elements of x_i - base, with the others set to 0. The elected sign of an element is the
    sign of sum_i d_i, or plus if the sum is 0. out = base + lambda (sum of the d_i with that sign) / (sum of their w_i)

    Args:
        weight: weight of this model's task vector.
        density: fraction of this model's task vector that is kept.
        normalize: divide each element by the sum of the weights of the models that agree.
        rescale: scale each sparse task vector back to its original L1 norm.
        rescale_eps: smallest L1 norm, before and after dropping, that is rescaled.
        lambda_: factor of the sum before it is added to the base.
    """
    sparsifier = top_k(inputs, density)
    eps = rescale_eps if rescale else None
    return elected_deltas(inputs, sparsifier, weight=weight, lambda_=lambda_, rescale_eps=eps, normalize=normalize)


@merge_method("dare_linear", paper=DARE, base=Base.REQUIRED)
def dare_linear(
    inputs: Inputs,
    *,
    weight: PerInput[Finite],
    density: PerInput[Fraction] = (1.0,),
    unbiased: bool = False,
    normalize: bool = False,
    rescale: bool = True,
    rescale_eps: NonNegative = 1e-7,
    divisor_eps: NonNegative = 1e-8,
    lambda_: Finite = 1.0,
) -> Kernel:
    """Drop random elements of the task vectors, rescale the rest, and add them to the base.

    d_i = w_i times x_i - base, of which each element is kept with probability density, rescaled to the L1 norm of
    x_i - base. out = base + lambda sum_i d_i

    Args:
        weight: weight of this model's task vector.
        density: fraction of this model's task vector that is kept.
        unbiased: rescale as in the paper: divide each kept element by its probability.
        normalize: divide by the sum of all weights, unless its absolute value is below `divisor_eps`.
        rescale: scale each sparse task vector back to its original L1 norm.
        rescale_eps: smallest L1 norm, before and after dropping, that is rescaled.
        divisor_eps: smallest sum of weights (absolute value) to divide by.
        lambda_: factor of the sum before it is added to the base.
    """
    sparsifier = Bernoulli(inputs, density, unbiased=rescale and unbiased)
    eps = rescale_eps if rescale and not unbiased else None
    divisor = divisor_eps if normalize else None
    return weighted_deltas(inputs, sparsifier, weight=weight, lambda_=lambda_, rescale_eps=eps, divisor_eps=divisor)


@merge_method("dare_ties", paper=DARE, base=Base.REQUIRED)
def dare_ties(
    inputs: Inputs,
    *,
    weight: PerInput[Finite],
    density: PerInput[Fraction] = (1.0,),
    unbiased: bool = False,
    normalize: bool = False,
    rescale: bool = True,
    rescale_eps: NonNegative = 1e-7,
    lambda_: Finite = 1.0,
) -> Kernel:
    """Drop random elements of the task vectors, rescale the rest, and add the values that agree with the elected sign.

    d_i as in dare_linear, the elected sign as in ties. out = base + lambda (sum of the d_i with that sign)

    Args:
        weight: weight of this model's task vector.
        density: fraction of this model's task vector that is kept.
        unbiased: rescale as in the paper: divide each kept element by its probability.
        normalize: divide each element by the sum of the weights of the models that agree.
        rescale: scale each sparse task vector back to its original L1 norm.
        rescale_eps: smallest L1 norm, before and after dropping, that is rescaled.
        lambda_: factor of the sum before it is added to the base.
    """
    sparsifier = Bernoulli(inputs, density, unbiased=rescale and unbiased)
    eps = rescale_eps if rescale and not unbiased else None
    return elected_deltas(inputs, sparsifier, weight=weight, lambda_=lambda_, rescale_eps=eps, normalize=normalize)


@merge_method("della_linear", paper=DELLA, base=Base.REQUIRED)
def della_linear(
    inputs: Inputs,
    *,
    weight: PerInput[Finite],
    density: PerInput[Fraction] = (1.0,),
    epsilon: PerInput[HalfWidth] = (0.15,),
    unbiased: bool = False,
    normalize: bool = False,
    rescale: bool = True,
    rescale_eps: NonNegative = 1e-7,
    divisor_eps: NonNegative = 1e-8,
    lambda_: Finite = 1.0,
) -> Kernel:
    """Drop random elements of the task vectors, preferably small ones, rescale, and add them to the base.

    As dare_linear, with the probabilities of della.

    Args:
        weight: weight of this model's task vector.
        density: fraction of this model's task vector that is kept.
        epsilon: half the width of the range of probabilities, centered at the density.
        unbiased: rescale as in the paper: divide each kept element by its probability.
        normalize: divide by the sum of all weights, unless its absolute value is below `divisor_eps`.
        rescale: scale each sparse task vector back to its original L1 norm.
        rescale_eps: smallest L1 norm, before and after dropping, that is rescaled.
        divisor_eps: smallest sum of weights (absolute value) to divide by.
        lambda_: factor of the sum before it is added to the base.
    """
    sparsifier = MagPrune(inputs, density, epsilon, unbiased=rescale and unbiased)
    eps = rescale_eps if rescale and not unbiased else None
    divisor = divisor_eps if normalize else None
    return weighted_deltas(inputs, sparsifier, weight=weight, lambda_=lambda_, rescale_eps=eps, divisor_eps=divisor)


@merge_method("della", paper=DELLA, base=Base.REQUIRED)
def della(
    inputs: Inputs,
    *,
    weight: PerInput[Finite],
    density: PerInput[Fraction] = (1.0,),
    epsilon: PerInput[HalfWidth] = (0.15,),
    unbiased: bool = False,
    normalize: bool = True,
    rescale: bool = True,
    rescale_eps: NonNegative = 1e-7,
    lambda_: Finite = 1.0,
) -> Kernel:
    """Drop random elements of the task vectors, preferably small ones, rescale, and average the values that agree.

    As dare_ties, but the probability of keeping an element rises from density - epsilon to density + epsilon with the
    rank of its absolute value in its row, and the sum is divided by the weights.

    Args:
        weight: weight of this model's task vector.
        density: fraction of this model's task vector that is kept.
        epsilon: half the width of the range of probabilities, centered at the density.
        unbiased: rescale as in the paper: divide each kept element by its probability.
        normalize: divide each element by the sum of the weights of the models that agree.
        rescale: scale each sparse task vector back to its original L1 norm.
        rescale_eps: smallest L1 norm, before and after dropping, that is rescaled.
        lambda_: factor of the sum before it is added to the base.
    """
    sparsifier = MagPrune(inputs, density, epsilon, unbiased=rescale and unbiased)
    eps = rescale_eps if rescale and not unbiased else None
    return elected_deltas(inputs, sparsifier, weight=weight, lambda_=lambda_, rescale_eps=eps, normalize=normalize)


@merge_method("breadcrumbs", paper=BREADCRUMBS, base=Base.REQUIRED)
def breadcrumbs(
    inputs: Inputs,
    *,
    weight: PerInput[Finite],
    density: PerInput[Fraction] = (1.0,),
    gamma: PerInput[Fraction] = (0.01,),
    normalize: bool = False,
    rescale: bool = False,
    rescale_eps: NonNegative = 1e-7,
    divisor_eps: NonNegative = 1e-8,
    lambda_: Finite = 1.0,
) -> Kernel:
    """Drop the largest and the smallest elements of the task vectors, and add the rest to the base.

    d_i = w_i times x_i - base without its gamma n largest elements, and without the smallest, which leaves density n
    of n. out = base + lambda sum_i d_i

    Args:
        weight: weight of this model's task vector.
        density: fraction of this model's task vector that is kept.
        gamma: fraction of the elements, the largest ones, that is dropped (beta in the paper).
        normalize: divide by the sum of all weights, unless its absolute value is below `divisor_eps`.
        rescale: scale each sparse task vector back to its original L1 norm.
        rescale_eps: smallest L1 norm, before and after dropping, that is rescaled.
        divisor_eps: smallest sum of weights (absolute value) to divide by.
        lambda_: factor of the sum before it is added to the base.
    """
    sparsifier = drop_outliers(inputs, density, gamma)
    eps = rescale_eps if rescale else None
    divisor = divisor_eps if normalize else None
    return weighted_deltas(inputs, sparsifier, weight=weight, lambda_=lambda_, rescale_eps=eps, divisor_eps=divisor)


@merge_method("breadcrumbs_ties", paper=BREADCRUMBS, base=Base.REQUIRED)
def breadcrumbs_ties(
    inputs: Inputs,
    *,
    weight: PerInput[Finite],
    density: PerInput[Fraction] = (1.0,),
    gamma: PerInput[Fraction] = (0.01,),
    normalize: bool = False,
    rescale: bool = False,
    rescale_eps: NonNegative = 1e-7,
    lambda_: Finite = 1.0,
) -> Kernel:
    """Drop the largest and smallest elements of the task vectors, and add the values that agree with the elected sign.

    d_i as in breadcrumbs, the elected sign as in ties. out = base + lambda (sum of the d_i with that sign)

    Args:
        weight: weight of this model's task vector.
        density: fraction of this model's task vector that is kept.
        gamma: fraction of the elements, the largest ones, that is dropped (beta in the paper).
        normalize: divide each element by the sum of the weights of the models that agree.
        rescale: scale each sparse task vector back to its original L1 norm.
        rescale_eps: smallest L1 norm, before and after dropping, that is rescaled.
        lambda_: factor of the sum before it is added to the base.
    """
    sparsifier = drop_outliers(inputs, density, gamma)
    eps = rescale_eps if rescale else None
    return elected_deltas(inputs, sparsifier, weight=weight, lambda_=lambda_, rescale_eps=eps, normalize=normalize)
