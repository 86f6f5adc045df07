"""The Karcher mean."""

from __future__ import annotations

import math

from ..definition import Array, Inputs, Positive, PositiveInt, merge_method
from .span import Span, Vector, combination, linear_combination, sphere_mean


@merge_method("karcher", paper="https://doi.org/10.1002/cpa.3160300502")
def karcher(t: Inputs, *, max_iter: PositiveInt = 10, tol: Positive = 1e-5) -> Array:
    """The Karcher (Riemannian) mean of the models' directions, scaled to the mean of their norms.

    out = mean_i |x_i| m, where m is the point on the sphere at which the tangents log_m(x_i / |x_i|) to all directions
    sum to zero. The iteration starts at the mean direction, and each step goes to exp_m of the mean tangent. If the
    directions cancel out, m is the first one.

    Args:
        max_iter: maximum number of steps.
        tol: step length below which the iteration stops, and norm up to which a tensor has no direction.
    """
    share = 1 / len(t.models)

    def coefficients(span: Span) -> Vector:
        mean = sphere_mean(span, [share] * len(t.models), max_iter, tol, tol)
        if not any(mean):
            first = next((i for i, length in enumerate(span.lengths) if length > tol), None)
            mean = mean if first is None else span.direction(first)
        return linear_combination((share * math.fsum(span.lengths), mean))

    return t.models[0] if len(t.models) == 1 else combination(t, t.models, coefficients)
