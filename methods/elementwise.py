"""Methods whose output elements depend only on the same elements of the inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .kernel.contract import (
    Absent,
    Base,
    Finite,
    Inputs,
    Kernel,
    MethodError,
    NonNegative,
    PerInput,
    Positive,
    base_of,
    merge_method,
    only,
)
from .kernel.lazy import torch
from .kernel.lazy_ops import ops

if TYPE_CHECKING:
    from torch import Tensor

    from .kernel.tile import Tile


class WeightedSum(Kernel):
    """The sum of the inputs multiplied by fixed coefficients, added in recipe order."""

    workspace_per_element = 2
    propagates_nonfinite = True

    def __init__(self, inputs: Inputs, coefficients: Sequence[float]) -> None:
        super().__init__(inputs)
        self.coefficients = coefficients

    def combine(self, tile: Tile, state: Any) -> Tensor:
        return ops.weighted_sum(tile.empty(), tile.empty(), list(tile.inputs), list(self.coefficients), None)


def weighted_sum(inputs: Inputs, coefficients: Sequence[float]) -> Kernel:
    """The kernel of a weighted sum; a plain copy if the only coefficient is 1."""
    return Copy(inputs, 0) if list(coefficients) == [1.0] else WeightedSum(inputs, coefficients)


class Copy(Kernel):
    """A copy of one input."""

    workspace_per_element = 1

    def __init__(self, inputs: Inputs, index: int) -> None:
        super().__init__(inputs)
        self.copies = index

    def combine(self, tile: Tile, state: Any) -> Tensor:
        return tile.load(self.copies or 0)


@merge_method("linear", paper="https://arxiv.org/abs/2203.05482")
def linear(inputs: Inputs, *, weight: PerInput[Finite], normalize: bool = True) -> Kernel:
    """The weighted mean of the models' weights ("model soup").

    out = sum_i w_i x_i / sum_i w_i, without the division if `normalize` is false.

    Args:
        weight: weight of this model.
        normalize: divide the weights by their sum.
    """
    total = math.fsum(weight) if normalize else 1.0
    if abs(total) <= 1e-12 * math.fsum(map(abs, weight)):
        message = "the weights sum to 0 and cannot be normalized: change them, or set `normalize: false`"
        raise MethodError(message, parameters=["weight"])
    return weighted_sum(inputs, [w / total for w in weight])


@merge_method("passthrough", maximum=1)
def passthrough(inputs: Inputs, *, scale: PerInput[Finite] = (1.0,)) -> Kernel:
    """A copy of the input, optionally scaled.

    out = scale x

    Args:
        scale: factor of every element.
    """
    return weighted_sum(inputs, [only(scale, "input")])


class NearSwap(Kernel):
    """Interpolation between two inputs with a weight per element."""

    workspace_per_element = 3
    propagates_nonfinite = True

    def __init__(self, inputs: Inputs, t: float, eps: float) -> None:
        super().__init__(inputs)
        self.t = t
        self.eps = eps

    def combine(self, tile: Tile, state: Any) -> Tensor:
        base, other = tile.load(base_of(self.inputs)), tile.load(self.inputs.others[0])
        weight = tile.empty()
        distance = torch.sub(base, other, out=weight).abs_().clamp_(min=self.eps)
        torch.div(torch.full((), self.t, dtype=weight.dtype, device=weight.device), distance, out=weight).clamp_(0, 1)
        other.mul_(weight)
        return base.mul_(weight.neg_().add_(1)).add_(other)


@merge_method(
    "nearswap",
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    base=Base.REQUIRED,
    maximum=1,
    absent=Absent.SINGLE_BASE,
)
def nearswap(inputs: Inputs, *, t: NonNegative, eps: Positive = 1e-6) -> Kernel:
    """Interpolation from the base to the other model, strongest for elements where the two are close.

    out = (1-w) base + w x with w = t / |x - base|, clamped to the range from 0 to 1.

    Args:
        t: distance up to which the other model's value is used.
        eps: minimum distance to divide by.
    """
    return NearSwap(inputs, t, eps)
