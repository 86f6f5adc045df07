"""Methods whose result is a weighted sum of their inputs, with weights that follow from the inputs' inner products.

Slerp, the mean on the sphere and model stock never leave the span of their inputs: what they need to know of the
tensors is the Gram matrix, n x n numbers. One pass makes it, a little scalar geometry turns it into coefficients, and
one pass makes the weighted sum. The geometry works on vectors given by their coefficients: see `Span`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .contract import BLOCK, Inputs, Kernel, MethodError
from .lazy import torch
from .reductions import BlockSums

if TYPE_CHECKING:
    from torch import Tensor

    from .tile import Tile

Vector = Sequence[float]
"""A vector in the span of the inputs: its coefficients."""


class Span:
    """The space that some vectors span, with their inner products.

    Args:
        gram: the inner product of each two of them.
    """

    def __init__(self, gram: Sequence[Sequence[float]]) -> None:
        self.gram = gram
        self.size = len(gram)

    def unit(self, index: int) -> list[float]:
        """The vector `index` itself."""
        return [float(i == index) for i in range(self.size)]

    def dot(self, a: Vector, b: Vector) -> float:
        """The inner product of two vectors."""
        return math.fsum(
            x * y * product
            for x, row in zip(a, self.gram, strict=True)
            for y, product in zip(b, row, strict=True)
        )

    def norm(self, a: Vector) -> float:
        """The length of a vector."""
        return math.sqrt(max(0.0, self.dot(a, a)))

    def norms(self) -> list[float]:
        """The lengths of the vectors that span the space."""
        return [math.sqrt(self.gram[i][i]) for i in range(self.size)]

    def cosine(self, i: int, j: int, floor: float) -> float:
        """The cosine between two of them, the product of whose lengths counts as at least `floor`."""
        product = math.sqrt(self.gram[i][i]) * math.sqrt(self.gram[j][j])
        return max(-1.0, min(1.0, self.gram[i][j] / max(product, floor)))


def add(*terms: tuple[float, Vector]) -> list[float]:
    """The sum of vectors times numbers."""
    return [math.fsum(f * x for (f, _), x in zip(terms, column, strict=True)) for column in zip(*(v for _, v in terms), strict=True)]


Coefficients = Callable[[Span], Vector]


class Combination(Kernel):
    """The weighted sum of the inputs, or the base plus that of their differences from it, with weights from their Gram
    matrix.

    Args:
        inputs: of the tensor.
        origin: the input that the others are taken relative to, or None.
        coefficients: from the Gram matrix of the vectors, in recipe order, to their weights in the sum.
    """

    reductions = 1
    transparent = True  # a sum that is no number makes every coefficient NaN

    def __init__(self, inputs: Inputs, origin: int | None, coefficients: Coefficients) -> None:
        super().__init__(inputs)
        self.origin = origin
        self.coefficients = coefficients
        self.vectors = [i for i in range(inputs.count) if i != origin]
        count = len(self.vectors)
        self.pairs = [(i, j) for i in range(count) for j in range(i, count)]
        self.buffers = max(4, 2 + 2 * (count + 1) + BlockSums.size(len(self.pairs)))

    def reduce(self, index: int, tile: Tile, state: Any) -> list[Tensor]:
        workspace = tile.workspace
        elements = tile.elements
        sums = BlockSums(len(self.pairs), elements, BLOCK, workspace)
        product = workspace.take(elements, torch.float64)
        vectors = [workspace.take(elements, torch.float64) for _ in self.vectors]
        for vector, loaded in zip(vectors, self._load(tile), strict=True):
            vector.copy_(loaded.view(-1))
        for i, j in self.pairs:
            sums.add(torch.mul(vectors[i], vectors[j], out=product))
        return [sums.partial()]

    def finish(self, index: int, merged: Any, state: Any) -> Vector:
        count = len(self.vectors)
        gram = [[0.0] * count for _ in range(count)]
        for (i, j), blocks in zip(self.pairs, torch.cat(merged, 1).tolist() if merged else (), strict=False):
            gram[i][j] = gram[j][i] = math.fsum(blocks)
        if not all(math.isfinite(x) for row in gram for x in row):
            return [math.nan] * count
        return self.coefficients(Span(gram))

    def combine(self, tile: Tile, state: Vector) -> Tensor:
        total = tile.empty()
        for place, (vector, coefficient) in enumerate(zip(self._load(tile), state, strict=True)):
            if place == 0:
                torch.mul(vector, coefficient, out=total)
            else:
                total.add_(vector.mul_(coefficient))
        return total if self.origin is None else total.add_(tile.load(self.origin))
