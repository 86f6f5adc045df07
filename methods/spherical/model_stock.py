"""Model Stock."""

from __future__ import annotations

import itertools
import math

from ..definition import Absent, Array, Base, Inputs, NonNegative, merge_method
from .span import Span, Vector, combination


@merge_method(
    "model_stock", paper="https://arxiv.org/abs/2403.19522", base=Base.REQUIRED, minimum=2, absent=Absent.SINGLE_BASE
)
def model_stock(t: Inputs, *, filter_wise: bool = False, eps: NonNegative = 1e-6) -> Array:
    """Interpolation between the base and the mean of the fine-tuned models, by the angle between these.

    out = r mean_i(x_i) + (1-r) base with r = N c / (1 + (N-1) c), where c is the mean cosine of the angles between all
    pairs of the N task vectors x_i - base.

    Args:
        filter_wise: use one angle per row instead of one for the tensor.
        eps: minimum product of norms in a cosine, and denominator below which the output is the base.
    """
    n = len(t.models)
    pairs = list(itertools.combinations(range(n), 2))

    def coefficients(span: Span) -> Vector:
        cosine = math.fsum(span.cosine(i, j, eps) for i, j in pairs) / len(pairs)
        denominator = 1 + (n - 1) * cosine
        ratio = n * cosine / denominator if denominator and abs(denominator) >= eps else 0.0
        return [ratio / n] * n

    inner = t.row_sum if filter_wise else None
    return t.base + combination(t, [x - t.base for x in t.models], coefficients, inner=inner)
