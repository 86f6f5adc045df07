"""Slerp: spherical linear interpolation."""

from __future__ import annotations

import math

from ..definition import Absent, Array, Base, Finite, Fraction, Inputs, NonNegative, merge_method
from .span import Span, Vector, arc, combination


@merge_method(
    "slerp",
    paper="https://dl.acm.org/doi/10.1145/325334.325242",
    base=Base.REQUIRED,
    maximum=1,
    absent=Absent.SINGLE,
)
def slerp(t: Inputs, *, t_: Finite, dot_threshold: Fraction = 0.9995, eps: NonNegative = 1e-8) -> Array:
    """Spherical interpolation from the base (t = 0) to the other model (t = 1).

    out = sin((1-t) a) / sin(a) x_0 + sin(t a) / sin(a) x_1, where a is the angle between the two tensors. Nearly
    parallel or opposite tensors are interpolated linearly: (1-t) x_0 + t x_1. A zero tensor is orthogonal to any other.

    Args:
        t_: position between the two models; values below 0 or above 1 extrapolate.
        dot_threshold: absolute value of the cosine above which interpolation is linear.
        eps: norm up to which a tensor counts as zero.
    """

    def coefficients(span: Span) -> Vector:
        cosine = span.cosine(0, 1) if min(span.lengths) > eps else 0.0
        return (1 - t_, t_) if abs(cosine) > dot_threshold else arc(math.acos(cosine), t_)

    return combination(t, [t.base, t.other], coefficients)
