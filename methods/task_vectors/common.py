"""What the task-vector methods share: weighted sums, the sign election, and restoring the norm of sparse vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..kernel.language import Array, Inputs, add, host

TASK_ARITHMETIC = "https://arxiv.org/abs/2212.04089"
TIES = "https://arxiv.org/abs/2306.01708"
DARE = "https://arxiv.org/abs/2311.03099"
DELLA = "https://arxiv.org/abs/2406.11617"
BREADCRUMBS = "https://arxiv.org/abs/2312.06795"


def task_vectors(t: Inputs) -> list[Array]:
    """The differences of the models from the base, in recipe order."""
    return [x - t.base for x in t.models]


def weighted_sum(
    t: Inputs,
    vectors: Sequence[Array],
    weight: Sequence[float],
    scale: Sequence[Array | float] | None = None,
    *,
    lambda_: float,
    normalize: bool,
    divisor_eps: float,
) -> Array:
    """The base plus lambda times the weighted sum of the vectors, optionally divided by the sum of the weights.

    Args:
        t: inputs.
        vectors: task vectors.
        weight: weight of each vector.
        scale: another factor of each vector, which does not count as a weight.
        lambda_: factor of the sum.
        normalize: whether to divide by the sum of the weights.
        divisor_eps: minimum sum of weights (absolute value) to divide by.
    """
    divisor = math.fsum(weight) if normalize else 1.0
    factor = lambda_ / divisor if divisor and abs(divisor) >= divisor_eps else lambda_
    return t.base + factor * add(weighted(vectors, weight, scale))


def elected_sum(
    t: Inputs,
    vectors: Sequence[Array],
    weight: Sequence[float],
    scale: Sequence[Array | float] | None = None,
    *,
    lambda_: float,
    normalize: bool,
) -> Array:
    """As `weighted_sum`, but each element sums only the vectors that have the elected sign there.

    With `normalize`, an element is divided by the sum of the weights of these vectors, unless that is 0.
    """
    terms = weighted(vectors, weight, scale)
    agree = agreement(terms)
    merged = add([term * a for term, a in zip(terms, agree, strict=True)])
    if normalize:
        divisor = add([w * a for w, a in zip(weight, agree, strict=True)])
        merged = merged / (divisor + (divisor == 0))
    return t.base + lambda_ * merged


def weighted(
    vectors: Sequence[Array], weight: Sequence[float], scale: Sequence[Array | float] | None = None
) -> list[Array]:
    """The vectors multiplied by their weight and scale."""
    return [w * s * v for v, w, s in zip(vectors, weight, scale or [1.0] * len(vectors), strict=True)]


def agreement(terms: Sequence[Array]) -> list[Array]:
    """Whether each term has the elected sign: for each element that of the sum of all terms, or plus if it is 0."""
    sign = 2.0 * (add(terms) >= 0) - 1.0
    return [term * sign > 0 for term in terms]


def restored_norms(
    t: Inputs, vectors: Sequence[Array], sparse: Sequence[Array], rescale_eps: float
) -> list[Array | float]:
    """The factor that gives each sparse vector the L1 norm of the original; 1 if a norm is below `rescale_eps`."""

    def ratio(before: float, after: float) -> float:
        return before / after if after and min(before, after) >= rescale_eps else 1.0

    return [
        1.0 if kept.node is vector.node else host(ratio, t.sum(abs(vector)), t.sum(abs(kept)))
        for vector, kept in zip(vectors, sparse, strict=True)
    ]
