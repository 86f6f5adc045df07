"""What the task-vector methods share: weighted sums, the sign election, and restoring the norm of sparse vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..kernel.language import Array, Inputs, add, host, where

TASK_ARITHMETIC = "https://arxiv.org/abs/2212.04089"
TIES = "https://arxiv.org/abs/2306.01708"
DARE = "https://arxiv.org/abs/2311.03099"
DELLA = "https://arxiv.org/abs/2406.11617"
BREADCRUMBS = "https://arxiv.org/abs/2312.06795"

_CANCELLED = 1e-6  # of the sum of the absolute weights: what rounding to float32 leaves of weights that cancel


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

    With `normalize`, an element is divided by the sum of the weights of these vectors; a sum of 0 counts as 1.
    """
    terms = weighted(vectors, weight, scale)
    agree = agreement(terms)
    merged = add([term * a for term, a in zip(terms, agree, strict=True)])
    if normalize:
        merged = merged / agreeing_weight(weight, agree)
    return t.base + lambda_ * merged


def weighted(
    vectors: Sequence[Array], weight: Sequence[float], scale: Sequence[Array | float] | None = None
) -> list[Array]:
    """The vectors multiplied by their weight and scale."""
    return [w * s * v for v, w, s in zip(vectors, weight, scale or [1.0] * len(vectors), strict=True)]


def agreement(terms: Sequence[Array]) -> list[Array]:
    """Which terms have the elected sign: that of the sum of all, or plus where it is 0. A term of 0 never agrees."""
    sign = 2.0 * (add(terms) >= 0) - 1.0
    return [term * sign > 0 for term in terms]


def agreeing_weight(weight: Sequence[float], agree: Sequence[Array]) -> Array:
    """The sum of the weights of the terms that agree; a sum of 0 counts as 1.

    Weights of both signs can cancel, which leaves a small number instead of 0, because each addition is rounded.
    """
    divisor = add([w * a for w, a in zip(weight, agree, strict=True)])
    if min(weight) >= 0 or max(weight) <= 0:
        return divisor + (divisor == 0)
    return where(abs(divisor) <= _CANCELLED * math.fsum(map(abs, weight)), 1.0, divisor)


def restored_norms(
    t: Inputs, vectors: Sequence[Array], sparse: Sequence[Array], rescale_eps: float
) -> list[Array | float]:
    """The factor that gives each sparse vector the L1 norm of the original.

    It is 1 if a norm is below `rescale_eps`, if nothing is left, or if nothing was dropped.
    """

    def ratio(before: float, after: float) -> float:
        return before / after if after and min(before, after) >= rescale_eps else 1.0

    return [
        1.0 if kept.node is vector.node else host(ratio, t.sum(abs(vector)), t.sum(abs(kept)))
        for vector, kept in zip(vectors, sparse, strict=True)
    ]
