"""NuSlerp: slerp with weights."""

from __future__ import annotations

import math

from ..definition import Absent, Array, Base, Fraction, Inputs, NonNegative, merge_method
from ..parameters import Weight
from .span import Span, Vector, arc, combination


@merge_method("nuslerp", base=Base.OPTIONAL, minimum=2, maximum=2, absent=Absent.SINGLE)
def nuslerp(
    t: Inputs,
    *,
    weight: Weight,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    dot_threshold: Fraction = 0.999999,
    eps: NonNegative = 1e-8,
) -> Array:
    """Spherical interpolation between two models, or between their task vectors if there is a base.

    out = sin((1-t) a) / sin(a) x_1 + sin(t a) / sin(a) x_2 with t = w_2 / (w_1 + w_2), where a is the angle between
    the two tensors, rows or columns. Interpolation is linear if these are parallel or opposite. With a base, x_i is
    replaced by x_i - base, and base is added to the result. Two weights that sum to 0 count as equal.

    Args:
        nuslerp_flatten: use one angle for the tensor instead of one per row.
        nuslerp_row_wise: with `nuslerp_flatten: false`, use one angle per column instead of one per row.
        dot_threshold: absolute value of the cosine above which interpolation is linear.
        eps: sum of weights below which the weights count as equal.
    """
    total = sum(weight)
    position = weight[1] / total if total and abs(total) >= eps else 0.5

    def coefficients(span: Span) -> Vector:
        cosine = span.cosine(0, 1)
        linear = abs(cosine) > dot_threshold
        return (1 - position, position) if linear else arc(math.acos(cosine), position)

    inner = None if nuslerp_flatten else t.column_sum if nuslerp_row_wise else t.row_sum
    return t.origin + combination(t, [x - t.origin for x in t.models], coefficients, inner=inner)
