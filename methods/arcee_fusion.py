"""Arcee Fusion: takes the most important differences from the other model."""

from __future__ import annotations

from .definition import Absent, Array, Base, Finite, Inputs, Positive, host, maximum, merge_method
from .kernel.language import exp, log, single, wide


@merge_method(
    "arcee_fusion",
    paper="https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration",
    base=Base.REQUIRED,
    maximum=1,
    absent=Absent.SINGLE,
)
def arcee_fusion(t: Inputs, *, iqr_factor: Finite = 1.5, eps: Positive = 1e-8) -> Array:
    """The base with the most important elements of the other model.

    The importance of an element is |x - base| times the divergence KL(softmax(x) || softmax(base)) of its row. out = x
    for an importance of at least Q2 + iqr_factor (Q3 - Q1), else the base. Q1, Q2 and Q3 are the quartiles of the
    importance in the tensor: the elements at floor(q (n - 1)) in ascending order.

    Args:
        iqr_factor: distance above the median, in interquartile ranges, from which an element is taken.
        eps: number that is added to each probability.
    """
    p, q = softmax(t, t.other) + eps, softmax(t, t.base) + eps
    divergence = maximum(t.row_sum(p * (log(p) - log(q))), 0.0)  # negative only because of rounding
    importance = single(abs(t.other - t.base) * divergence)
    quartiles = [t.kth_largest(importance, t.size - int(share * (t.size - 1))) for share in (0.25, 0.5, 0.75)]
    bound: Array = host(lambda first, median, third: median + iqr_factor * (third - first), *quartiles)
    return t.base + (t.other - t.base) * (importance >= bound)


def softmax(t: Inputs, x: Array) -> Array:
    """The softmax of each row in float64."""
    powers = exp(wide(x) - t.row_max(x))
    return powers / t.row_sum(powers)
