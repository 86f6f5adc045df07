"""Multislerp: a mean of directions."""

from __future__ import annotations

import math

from ..definition import Array, Base, Inputs, MethodError, NonNegative, NonNegativeInt, Positive, merge_method
from ..parameters import Weight
from .span import Span, Vector, combination, linear_combination, sphere_mean


@merge_method("multislerp", base=Base.OPTIONAL)
def multislerp(
    t: Inputs,
    *,
    weight: Weight,
    normalize_weights: bool = True,
    max_iter: NonNegativeInt = 0,
    tol: Positive = 1e-5,
    eps: NonNegative = 1e-8,
) -> Array:
    """The weighted mean of the models' directions, scaled to the weighted mean of their norms.

    out = sum_i w_i |x_i| m, where m is the direction of sum_i w_i x_i / |x_i|. With a base, x_i is replaced by
    x_i - base, and base is added to the result. Directions that cancel out give zero. A single model is copied.

    Args:
        normalize_weights: divide the weights by their sum.
        max_iter: maximum number of steps from m towards the weighted Karcher mean.
        tol: step length below which the iteration stops.
        eps: norm up to which a tensor or a sum of directions counts as zero.
    """
    total = math.fsum(weight) if normalize_weights else 1.0
    if abs(total) < eps or not total:
        message = "the weights sum to 0: change them, or set `normalize_weights: false`"
        raise MethodError(message, parameters=["weight"])
    used = [(w / total, x - t.origin) for w, x in zip(weight, t.models, strict=True) if w]
    weights = [w for w, _ in used]

    def coefficients(span: Span) -> Vector:
        length = math.fsum(w * x for w, x in zip(weights, span.lengths, strict=True))
        return linear_combination((length, sphere_mean(span, weights, max_iter, tol, eps)))

    if len(t.models) == 1 or not used:
        return t.models[0] if used else t.origin
    return t.origin + combination(t, [vector for _, vector in used], coefficients)
