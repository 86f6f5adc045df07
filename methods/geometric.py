"""Methods based on angles between tensors: slerp and its variants, means on the sphere, model stock."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .elementwise import Copy
from .gram import ColumnCombination, Combination, RowCombination, Span, Vector, linear_combination
from .kernel.contract import (
    Absent,
    Base,
    Finite,
    Fraction,
    Inputs,
    Kernel,
    MethodError,
    NonNegative,
    NonNegativeInt,
    PerInput,
    Positive,
    PositiveInt,
    merge_method,
)


def arc(angle: float, t: float) -> tuple[float, float]:
    """The coefficients of two unit vectors `angle` apart for the point at fraction `t` of the arc between them."""
    sine = math.sin(angle)
    return (math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine) if sine else (1 - t, t)


@merge_method(
    "slerp",
    paper="https://dl.acm.org/doi/10.1145/325334.325242",
    base=Base.REQUIRED,
    maximum=1,
    absent=Absent.SINGLE,
)
def slerp(inputs: Inputs, *, t: Finite, dot_threshold: Fraction = 0.9995, eps: NonNegative = 1e-8) -> Kernel:
    """Spherical interpolation from the base (t = 0) to the other model (t = 1).

    out = sin((1-t) a) / sin(a) x_0 + sin(t a) / sin(a) x_1, where a is the angle between the two tensors. Nearly
    parallel or opposite tensors are interpolated linearly: (1-t) x_0 + t x_1. A zero tensor is orthogonal to any other.

    Args:
        t: position between the two models; values below 0 or above 1 extrapolate.
        dot_threshold: absolute value of the cosine above which interpolation is linear.
        eps: norm up to which a tensor counts as zero.
    """

    def coefficients(span: Span) -> Vector:
        cosine = span.cosine(0, 1, 0.0) if min(span.lengths) > eps else 0.0
        first, second = (1 - t, t) if abs(cosine) > dot_threshold else arc(math.acos(cosine), t)
        return (first, second) if inputs.base == 0 else (second, first)

    return Combination(inputs, None, coefficients)


@merge_method("nuslerp", base=Base.OPTIONAL, minimum=2, maximum=2, absent=Absent.SINGLE)
def nuslerp(
    inputs: Inputs,
    *,
    weight: PerInput[Finite],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    dot_threshold: Fraction = 0.999999,
    eps: NonNegative = 1e-8,
) -> Kernel:
    """Spherical interpolation between two models, or between their task vectors if there is a base.

    out = sin((1-t) a) / sin(a) x_1 + sin(t a) / sin(a) x_2 with t = w_2 / (w_1 + w_2), where a is the angle between
    the two tensors, rows or columns. Interpolation is linear if these are parallel or opposite. With a base, x_i is
    replaced by x_i - base, and base is added to the result.

    Args:
        weight: weight of this model; two weights that sum to 0 count as equal.
        nuslerp_flatten: use one angle for the tensor instead of one per row.
        nuslerp_row_wise: with `nuslerp_flatten: false`, use one angle per column instead of one per row.
        dot_threshold: absolute value of the cosine above which interpolation is linear.
        eps: sum of weights below which the weights count as equal.
    """
    first, second = (weight[i] for i in inputs.others)
    total = first + second
    t = second / total if total and abs(total) >= eps else 0.5

    def coefficients(span: Span) -> Vector:
        cosine = span.cosine(0, 1, 0.0)
        return (1 - t, t) if abs(cosine) > dot_threshold else arc(math.acos(cosine), t)

    if nuslerp_flatten:
        return Combination(inputs, inputs.base, coefficients)
    return (ColumnCombination if nuslerp_row_wise else RowCombination)(inputs, inputs.base, coefficients)


_OPPOSITE = 2.0**-10
"""Sine below which two directions count as opposite; float32 products do not resolve smaller angles near pi."""


def sphere_mean(span: Span, weights: Sequence[float], steps: int, tol: float, eps: float) -> list[float]:
    """The weighted mean on the unit sphere of the directions of the span's vectors.

    Starts with the direction of the weighted mean of the unit vectors and takes up to `steps` Karcher steps (to the
    tangent space, the mean there, and back to the sphere) until a step is shorter than `tol`. Vectors with a norm up to
    `eps` have no direction, and one opposite to the mean has no tangent. Returns zero if the directions cancel out.
    """
    directed = [(w, span.direction(i)) for i, w in enumerate(weights) if span.lengths[i] > eps]
    start = linear_combination(*directed) if directed else [0.0] * len(weights)
    if (length := span.length(start)) <= eps:
        return [0.0] * len(weights)
    mean = linear_combination((1 / length, start))
    for _ in range(steps):
        tangents = []
        for w, direction in directed:
            cosine = max(-1.0, min(1.0, span.dot(direction, mean)))
            angle = math.acos(cosine)
            if math.sin(angle) > (eps if cosine > 0 else max(eps, _OPPOSITE)):
                tangents.append((w * angle / math.sin(angle), linear_combination((1.0, direction), (-cosine, mean))))
        tangent = linear_combination(*tangents) if tangents else [0.0] * len(weights)
        if (length := span.length(tangent)) < tol:
            break
        mean = linear_combination((math.cos(length), mean), (math.sin(length) / length, tangent))
    return mean


@merge_method("multislerp", base=Base.OPTIONAL)
def multislerp(
    inputs: Inputs,
    *,
    weight: PerInput[Finite],
    normalize_weights: bool = True,
    max_iter: NonNegativeInt = 0,
    tol: Positive = 1e-5,
    eps: NonNegative = 1e-8,
) -> Kernel:
    """The weighted mean of the models' directions, scaled to the weighted mean of their norms.

    out = sum_i w_i |x_i| m, where m is the direction of sum_i w_i x_i / |x_i|. With a base, x_i is replaced by
    x_i - base, and base is added to the result. Directions that cancel out give zero. A single model is copied.

    Args:
        weight: weight of this model.
        normalize_weights: divide the weights by their sum.
        max_iter: maximum number of steps from m towards the weighted Karcher mean.
        tol: step length below which the iteration stops.
        eps: norm up to which a tensor or a sum of directions counts as zero.
    """
    weights = [weight[i] for i in inputs.others]
    total = math.fsum(weights) if normalize_weights else 1.0
    if abs(total) < eps or not total:
        message = "the weights sum to 0: change them, or set `normalize_weights: false`"
        raise MethodError(message, parameters=["weight"])
    weights = [w / total for w in weights]

    def coefficients(span: Span) -> Vector:
        length = math.fsum(w * x for w, x in zip(weights, span.lengths, strict=True))
        return linear_combination((length, sphere_mean(span, weights, max_iter, tol, eps)))

    if len(weights) == 1:
        return Copy(inputs, inputs.others[0])
    return Combination(inputs, inputs.base, coefficients)


@merge_method("karcher", paper="https://doi.org/10.1002/cpa.3160300502")
def karcher(inputs: Inputs, *, max_iter: PositiveInt = 10, tol: Positive = 1e-5) -> Kernel:
    """The Karcher (Riemannian) mean of the models' directions, scaled to the mean of their norms.

    out = mean_i |x_i| m, where m is the point on the sphere at which the tangents log_m(x_i / |x_i|) to all directions
    sum to zero. The iteration starts at the mean direction, and each step goes to exp_m of the mean tangent. If the
    directions cancel out, m is the first one.

    Args:
        max_iter: maximum number of steps.
        tol: step length below which the iteration stops, and norm up to which a tensor has no direction.
    """
    share = 1 / inputs.count

    def coefficients(span: Span) -> Vector:
        mean = sphere_mean(span, [share] * inputs.count, max_iter, tol, tol)
        if not any(mean):
            first = next((i for i, length in enumerate(span.lengths) if length > tol), None)
            mean = mean if first is None else span.direction(first)
        return linear_combination((share * math.fsum(span.lengths), mean))

    if inputs.count == 1:
        return Copy(inputs, 0)
    return Combination(inputs, None, coefficients)


@merge_method(
    "model_stock", paper="https://arxiv.org/abs/2403.19522", base=Base.REQUIRED, minimum=2, absent=Absent.SINGLE_BASE
)
def model_stock(inputs: Inputs, *, filter_wise: bool = False, eps: NonNegative = 1e-6) -> Kernel:
    """Interpolation between the base and the mean of the fine-tuned models, by the angle between these.

    out = t mean_i(x_i) + (1-t) base with t = N c / (1 + (N-1) c), where c is the mean cosine of the angles between all
    pairs of the N task vectors x_i - base.

    Args:
        filter_wise: use one angle per row instead of one for the tensor.
        eps: minimum product of norms in a cosine, and denominator below which the output is the base.
    """
    n = len(inputs.others)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]

    def coefficients(span: Span) -> Vector:
        cosine = math.fsum(span.cosine(i, j, eps) for i, j in pairs) / len(pairs)
        denominator = 1 + (n - 1) * cosine
        t = n * cosine / denominator if denominator and abs(denominator) >= eps else 0.0
        return [t / n] * n

    return (RowCombination if filter_wise else Combination)(inputs, inputs.base, coefficients)
