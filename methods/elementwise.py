"""Methods that look at one element at a time and need to know nothing of the rest of the tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .contract import Inputs, Kernel, MethodError, PerInput, merge_method, only

if TYPE_CHECKING:
    from torch import Tensor

    from .tile import Tile


class WeightedSum(Kernel):
    """The sum of the inputs times fixed coefficients, added in recipe order."""

    buffers = 2
    transparent = True

    def __init__(self, inputs: Inputs, coefficients: Sequence[float]) -> None:
        super().__init__(inputs)
        self.coefficients = coefficients

    def combine(self, tile: Tile, state: Any) -> Tensor:
        total = tile.load(0).mul_(self.coefficients[0])
        if self.inputs.count > 1:
            term = tile.empty()
        for index in range(1, self.inputs.count):
            total.add_(tile.load(index, out=term).mul_(self.coefficients[index]))
        return total


def weighted_sum(inputs: Inputs, coefficients: Sequence[float]) -> Kernel:
    """The kernel of a sum with fixed coefficients."""
    return Copy(inputs, 0) if list(coefficients) == [1.0] else WeightedSum(inputs, coefficients)


class Copy(Kernel):
    """One of the inputs as it is."""

    buffers = 1

    def __init__(self, inputs: Inputs, index: int) -> None:
        super().__init__(inputs)
        self.copies = index

    def combine(self, tile: Tile, state: Any) -> Tensor:
        return tile.load(self.copies or 0)


@merge_method("linear", paper="https://arxiv.org/abs/2203.05482")
def linear(inputs: Inputs, *, weight: PerInput[float], normalize: bool = True) -> Kernel:
    """The weighted mean of the models' weights ("model soup").

    out = sum_i w_i x_i / sum_i w_i, or without the division where `normalize` is false.

    Args:
        weight: the weight of this model.
        normalize: divide the weights by their sum.
    """
    total = math.fsum(weight) if normalize else 1.0
    if total == 0:
        raise MethodError("the weights sum to 0, so they can't be normalized: change them, or set `normalize: false`")
    return weighted_sum(inputs, [w / total for w in weight])


@merge_method("passthrough", maximum=1)
def passthrough(inputs: Inputs, *, scale: PerInput[float] = (1.0,)) -> Kernel:
    """The one input as it is, or times a number.

    out = scale x

    Args:
        scale: what every element is multiplied by.
    """
    return weighted_sum(inputs, [only(scale, "input")])
