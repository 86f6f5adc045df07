"""SCE: select elements by variance, calculate model weights, erase elements with the minority sign."""

from __future__ import annotations

from collections.abc import Sequence

from .definition import Array, Base, Fraction, Inputs, NonNegative, add, host, maximum, merge_method
from .kernel.reduction.reductions import total
from .task_vectors.common import agreement


@merge_method("sce", paper="https://arxiv.org/abs/2408.07990", base=Base.REQUIRED)
def sce(
    t: Inputs, *, select_topk: Fraction = 1.0, weight_eps: NonNegative = 1e-6, divisor_eps: NonNegative = 1e-6
) -> Array:
    """Select the elements with the highest variance, weight the models, and erase elements with the minority sign.

    d_i = x_i - base where the variance over the models is among the highest (the fraction select_topk of those that
    are not 0), else 0. w_i = mean(d_i^2) / sum_j mean(d_j^2). The elected sign of an element is that of sum_i d_i, or
    plus if the sum is 0. out = base + (sum of the w_i d_i with that sign) / (sum of their w_i)

    Args:
        select_topk: fraction of the elements with nonzero variance that is selected; 1 selects all elements.
        weight_eps: sum of the mean squares below which all models have equal weights; the paper has 0.
        divisor_eps: minimum sum of weights to divide by; 0 to divide by any sum but 0.
    """
    selected = t.largest(variance(t.models), share=select_topk) if select_topk < 1 else 1.0
    deltas = [(x - t.base) * selected for x in t.models]

    def shares(squares: Sequence[float]) -> list[float]:
        means = [square / max(1, t.size) for square in squares]
        sum_of_means = total(means)
        equal = not sum_of_means or sum_of_means < weight_eps
        return [1 / len(means) if equal else mean / sum_of_means for mean in means]

    w = host(shares, [t.sum(d * d) for d in deltas], outputs=len(deltas))
    agree = agreement(deltas)
    divisor = maximum(add([w_i * a for w_i, a in zip(w, agree, strict=True)]), divisor_eps)
    divisor = divisor if divisor_eps else divisor + (divisor == 0)
    return t.base + add([w_i * (d * a) for w_i, d, a in zip(w, deltas, agree, strict=True)]) / divisor


def variance(models: Sequence[Array]) -> Array:
    """The variance of each element over n models, times n^3; exactly 0 if all are equal.

    With d_i = x_i - x_1, the distance of x_i from the mean is (n d_i - sum_j d_j) / n. Differences of bfloat16 values
    of similar size are exact in float32.
    """
    distances = [x - models[0] for x in models]
    total_distance = add(distances)
    from_mean = [len(models) * d - total_distance for d in distances]
    return add([d * d for d in from_mean])
