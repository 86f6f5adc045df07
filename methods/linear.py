"""The weighted mean."""

from __future__ import annotations

import math

from .definition import Array, Inputs, MethodError, add, merge_method
from .parameters import Weight


@merge_method("linear", paper="https://arxiv.org/abs/2203.05482")
def linear(t: Inputs, *, weight: Weight, normalize: bool = True) -> Array:
    """The weighted mean of the models' weights ("model soup").

    out = sum_i w_i x_i / sum_i w_i, without the division if `normalize` is false.

    Args:
        normalize: divide the weights by their sum.
    """
    total = math.fsum(weight) if normalize else 1.0
    if abs(total) <= 1e-12 * math.fsum(map(abs, weight)):
        message = "the weights sum to 0 and cannot be normalized: change them, or set `normalize: false`"
        raise MethodError(message, parameters=["weight"])
    return add([w / total * x for w, x in zip(weight, t.models, strict=True)])
