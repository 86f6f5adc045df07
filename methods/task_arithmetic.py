"""The task-vector methods: task arithmetic, TIES, DARE, DELLA, breadcrumbs."""

from __future__ import annotations

from .kernel.contract import Base, Finite, Fraction, HalfWidth, Inputs, Kernel, NonNegative, PerInput, merge_method
from .sparsify import Bernoulli, MagPrune, drop_outliers, largest
from .task_vectors import Sparsifier, TaskVectors

TASK_ARITHMETIC = "https://arxiv.org/abs/2212.04089"
TIES = "https://arxiv.org/abs/2306.01708"
DARE = "https://arxiv.org/abs/2311.03099"
DELLA = "https://arxiv.org/abs/2406.11617"
BREADCRUMBS = "https://arxiv.org/abs/2312.06795"


@merge_method("task_arithmetic", paper=TASK_ARITHMETIC, base=Base.REQUIRED)
def task_arithmetic(
    inputs: Inputs,
    *,
    weight: PerInput[Finite],
    normalize: bool = False,
    rescale: bool = False,
    divisor_eps: NonNegative = 1e-8,
    lambda_: Finite = 1.0,
    int8_mask: bool = False,
) -> Kernel:
    """The base plus the weighted sum of the task vectors.

    out = base + lambda sum_i w_i (x_i - base)

    Args:
        weight: the weight of this model's task vector.
        normalize: divide by the sum of the weights of all models, unless it is below `divisor_eps`.
        rescale: has no effect: nothing is dropped.
        divisor_eps: weights whose sum is below this in size are not divided by.
        lambda_: what the sum is multiplied by before it is added to the base.
        int8_mask: has no effect; it saves memory in mergekit.
    """
    return TaskVectors(
        inputs,
        Sparsifier(inputs),
        weight=weight,
        elect=False,
        normalize=normalize,
        rescale=None,
        divisor_eps=divisor_eps,
        factor=lambda_,
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
    int8_mask: bool = False,
) -> Kernel:
    """Trim the task vectors, elect a sign for each element, and average what agrees with it.

    d_i = w_i times the largest elements of x_i - base, the others set to 0. For each element, s is the sign of
    sum_i d_i, plus where that is 0; out = base + lambda (sum of the d_i with that sign) / (sum of their w_i).

    Args:
        weight: the weight of this model's task vector.
        density: the share of the elements of this model's task vector that are kept.
        normalize: divide by the sum of the weights of those that agree.
        rescale: give each task vector back the L1 norm that it had before elements were dropped.
        rescale_eps: a task vector whose norm is below this, before or after, is not rescaled.
        lambda_: what the sum is multiplied by before it is added to the base.
        int8_mask: has no effect; it saves memory in mergekit.
    """
    return TaskVectors(
        inputs,
        largest(inputs, density),
        weight=weight,
        elect=True,
        normalize=normalize,
        rescale=rescale_eps if rescale else None,
        divisor_eps=0.0,
        factor=lambda_,
    )


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
    int8_mask: bool = False,
) -> Kernel:
    """Drop elements of the task vectors at random, rescale what is left, and add them up.

    d_i = w_i times the elements of x_i - base that are kept, each with probability density, rescaled to the L1 norm of
    x_i - base; out = base + lambda sum_i d_i

    Args:
        weight: the weight of this model's task vector.
        density: the share of the elements of this model's task vector that are kept.
        unbiased: the paper's rescaling instead: divide what is kept by the probability of keeping it.
        normalize: divide by the sum of the weights of all models, unless it is below `divisor_eps`.
        rescale: give each task vector back the L1 norm that it had before elements were dropped.
        rescale_eps: a task vector whose norm is below this, before or after, is not rescaled.
        divisor_eps: weights whose sum is below this in size are not divided by.
        lambda_: what the sum is multiplied by before it is added to the base.
        int8_mask: has no effect; it saves memory in mergekit.
    """
    return TaskVectors(
        inputs,
        Bernoulli(inputs, density, unbiased=rescale and unbiased),
        weight=weight,
        elect=False,
        normalize=normalize,
        rescale=rescale_eps if rescale and not unbiased else None,
        divisor_eps=divisor_eps,
        factor=lambda_,
    )


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
    int8_mask: bool = False,
) -> Kernel:
    """Drop elements of the task vectors at random, rescale what is left, and add up what agrees with the elected sign.

    d_i as in dare_linear; the sign as in ties; out = base + lambda (sum of the d_i with that sign)

    Args:
        weight: the weight of this model's task vector.
        density: the share of the elements of this model's task vector that are kept.
        unbiased: the paper's rescaling instead: divide what is kept by the probability of keeping it.
        normalize: divide by the sum of the weights of those that agree.
        rescale: give each task vector back the L1 norm that it had before elements were dropped.
        rescale_eps: a task vector whose norm is below this, before or after, is not rescaled.
        lambda_: what the sum is multiplied by before it is added to the base.
        int8_mask: has no effect; it saves memory in mergekit.
    """
    return TaskVectors(
        inputs,
        Bernoulli(inputs, density, unbiased=rescale and unbiased),
        weight=weight,
        elect=True,
        normalize=normalize,
        rescale=rescale_eps if rescale and not unbiased else None,
        divisor_eps=0.0,
        factor=lambda_,
    )


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
    int8_mask: bool = False,
) -> Kernel:
    """Drop elements of the task vectors at random, small ones rather than large, rescale, and average what agrees.

    As dare_ties, but an element is kept with a probability that rises, by the rank of its size in its row, from
    density - epsilon to density + epsilon, and the sum is divided by the weights.

    Args:
        weight: the weight of this model's task vector.
        density: the share of the elements of this model's task vector that are kept.
        epsilon: how far the probabilities lie above and below the density.
        unbiased: the paper's rescaling instead: divide what is kept by the probability of keeping it.
        normalize: divide by the sum of the weights of those that agree.
        rescale: give each task vector back the L1 norm that it had before elements were dropped.
        rescale_eps: a task vector whose norm is below this, before or after, is not rescaled.
        lambda_: what the sum is multiplied by before it is added to the base.
        int8_mask: has no effect; it saves memory in mergekit.
    """
    return TaskVectors(
        inputs,
        MagPrune(inputs, density, epsilon, unbiased=rescale and unbiased),
        weight=weight,
        elect=True,
        normalize=normalize,
        rescale=rescale_eps if rescale and not unbiased else None,
        divisor_eps=0.0,
        factor=lambda_,
    )


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
    int8_mask: bool = False,
) -> Kernel:
    """Drop elements of the task vectors at random, small ones rather than large, rescale, and add up.

    As dare_linear, with the probabilities of della.

    Args:
        weight: the weight of this model's task vector.
        density: the share of the elements of this model's task vector that are kept.
        epsilon: how far the probabilities lie above and below the density.
        unbiased: the paper's rescaling instead: divide what is kept by the probability of keeping it.
        normalize: divide by the sum of the weights of all models, unless it is below `divisor_eps`.
        rescale: give each task vector back the L1 norm that it had before elements were dropped.
        rescale_eps: a task vector whose norm is below this, before or after, is not rescaled.
        divisor_eps: weights whose sum is below this in size are not divided by.
        lambda_: what the sum is multiplied by before it is added to the base.
        int8_mask: has no effect; it saves memory in mergekit.
    """
    return TaskVectors(
        inputs,
        MagPrune(inputs, density, epsilon, unbiased=rescale and unbiased),
        weight=weight,
        elect=False,
        normalize=normalize,
        rescale=rescale_eps if rescale and not unbiased else None,
        divisor_eps=divisor_eps,
        factor=lambda_,
    )


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
    int8_mask: bool = False,
) -> Kernel:
    """Drop the largest and the smallest elements of the task vectors, and add up the rest.

    d_i = w_i times the elements of x_i - base without the gamma n largest, and without the smallest, so that density n
    are left; out = base + lambda sum_i d_i

    Args:
        weight: the weight of this model's task vector.
        density: the share of the elements of this model's task vector that are kept.
        gamma: the share of the elements, the largest ones, that are dropped; the paper's beta.
        normalize: divide by the sum of the weights of all models, unless it is below `divisor_eps`.
        rescale: give each task vector back the L1 norm that it had before elements were dropped.
        rescale_eps: a task vector whose norm is below this, before or after, is not rescaled.
        divisor_eps: weights whose sum is below this in size are not divided by.
        lambda_: what the sum is multiplied by before it is added to the base.
        int8_mask: has no effect; it saves memory in mergekit.
    """
    return TaskVectors(
        inputs,
        drop_outliers(inputs, density, gamma),
        weight=weight,
        elect=False,
        normalize=normalize,
        rescale=rescale_eps if rescale else None,
        divisor_eps=divisor_eps,
        factor=lambda_,
    )


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
    int8_mask: bool = False,
) -> Kernel:
    """Drop the largest and the smallest elements of the task vectors, and add up what agrees with the elected sign.

    d_i as in breadcrumbs; the sign as in ties; out = base + lambda (sum of the d_i with that sign)

    Args:
        weight: the weight of this model's task vector.
        density: the share of the elements of this model's task vector that are kept.
        gamma: the share of the elements, the largest ones, that are dropped; the paper's beta.
        normalize: divide by the sum of the weights of those that agree.
        rescale: give each task vector back the L1 norm that it had before elements were dropped.
        rescale_eps: a task vector whose norm is below this, before or after, is not rescaled.
        lambda_: what the sum is multiplied by before it is added to the base.
        int8_mask: has no effect; it saves memory in mergekit.
    """
    return TaskVectors(
        inputs,
        drop_outliers(inputs, density, gamma),
        weight=weight,
        elect=True,
        normalize=normalize,
        rescale=rescale_eps if rescale else None,
        divisor_eps=0.0,
        factor=lambda_,
    )
