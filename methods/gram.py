"""The building blocks of geometric methods: weighted sums of the inputs with weights computed from the Gram matrix.

The results of slerp, means on the sphere and model stock are in the span of their inputs, so they depend on the tensors
only through the Gram matrix. One pass computes this n x n matrix, Python code converts it to coefficients, and a second
pass computes the weighted sum. The Python code represents vectors by their coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .kernel.block_sums import BlockSums, pairwise_fold, total
from .kernel.contract import BLOCK, Inputs, Kernel, Unit
from .kernel.lazy import torch
from .kernel.lazy_ops import ops

if TYPE_CHECKING:
    from torch import Tensor

    from .kernel.tile import Tile

Vector = Sequence[float]
"""The coefficients of a vector in the span of the inputs."""


class Span:
    """The span of several vectors, given by their inner products.

    Args:
        gram: Gram matrix, which contains the inner product of each pair of vectors.
    """

    def __init__(self, gram: Sequence[Sequence[float]]) -> None:
        self.gram = gram
        self.lengths = [math.sqrt(gram[i][i]) for i in range(len(gram))]

    def dot(self, a: Vector, b: Vector) -> float:
        """The inner product of two vectors."""
        return math.fsum(
            x * y * product for x, row in zip(a, self.gram, strict=True) for y, product in zip(b, row, strict=True)
        )

    def length(self, a: Vector) -> float:
        """The norm of a vector."""
        return math.sqrt(max(0.0, self.dot(a, a)))

    def direction(self, index: int) -> list[float]:
        """The unit vector in the direction of vector `index`, whose norm must not be 0."""
        return [1.0 / self.lengths[index] if i == index else 0.0 for i in range(len(self.gram))]

    def cosine(self, i: int, j: int, floor: float) -> float:
        """The cosine of the angle between vectors `i` and `j`, with `floor` as the minimum product of their norms."""
        product = max(self.lengths[i] * self.lengths[j], floor)
        return max(-1.0, min(1.0, self.gram[i][j] / product)) if product else 0.0


def linear_combination(*terms: tuple[float, Vector]) -> list[float]:
    """The sum of vectors multiplied by factors, given as (factor, vector) pairs."""
    factors = [factor for factor, _ in terms]
    columns = zip(*(vector for _, vector in terms), strict=True)
    return [math.fsum(f * x for f, x in zip(factors, column, strict=True)) for column in columns]


Coefficients = Callable[[Span], Vector]


class Combination(Kernel):
    """The sum of the inputs multiplied by coefficients that are computed from their Gram matrix.

    Args:
        inputs: inputs of the output tensor.
        origin: index of the input that is subtracted from the others and added to the result, or None.
        coefficients: computes the coefficient of each vector, in recipe order, from their span.
    """

    reductions = 1
    propagates_nonfinite = True  # if the Gram matrix is not finite, all coefficients are NaN

    def __init__(self, inputs: Inputs, origin: int | None, coefficients: Coefficients) -> None:
        super().__init__(inputs)
        self.origin = origin
        self.coefficients = coefficients
        self.indices = [i for i in range(inputs.count) if i != origin]
        count = len(self.indices)
        self.pairs = [(i, j) for i in range(count) for j in range(i, count)]
        self.workspace_per_element = max(4, 2 + count) + BlockSums.size(len(self.pairs))

    def reduce(self, index: int, tile: Tile, state: Any) -> list[Tensor]:
        sums = BlockSums(len(self.pairs), tile.elements, BLOCK, tile.workspace)
        origin = None if self.origin is None else tile.load(self.origin)
        vectors = [tile.empty() for _ in self.indices]
        ops.gram(tile.empty(), vectors, [tile.inputs[i] for i in self.indices], origin, sums.buffers)
        return [sums.partial()]

    def finish(self, index: int, merged: list[Tensor] | None, state: Any) -> Any:
        sums = torch.cat(merged, 1).tolist() if merged else [[]] * len(self.pairs)
        return self.solve([total(blocks) for blocks in sums])

    def combine(self, tile: Tile, state: Vector) -> Tensor:
        origin = None if self.origin is None else tile.load(self.origin)
        inputs = [tile.inputs[i] for i in self.indices]
        result = ops.weighted_sum(tile.empty(), tile.empty(), inputs, list(state), origin)
        return result if origin is None else result.add_(origin)

    def solve(self, sums: Sequence[float]) -> Vector:
        """Compute the coefficients from the inner product of each pair of vectors."""
        count = len(self.indices)
        if not all(map(math.isfinite, sums)):
            return [math.nan] * count
        gram = [[0.0] * count for _ in range(count)]
        for (i, j), value in zip(self.pairs, sums, strict=True):
            gram[i][j] = gram[j][i] = value
        return self.coefficients(Span(gram))


class SliceCombination(Combination):
    """A combination with separate coefficients for each slice of the tensor."""

    def shaped(self, buffer: Tensor) -> Tensor:
        """View a buffer of the tile's shape in a shape to which the factors broadcast."""
        return buffer

    def vectors(self, tile: Tile) -> Iterator[Tensor]:
        """Yield the vectors in the work dtype, in the same buffer."""
        origin = None if self.origin is None else tile.load(self.origin)
        buffer = tile.empty()
        for i in self.indices:
            vector = tile.load(i, out=buffer)
            yield vector if origin is None else vector.sub_(origin)

    def factors(self, tile: Tile, state: Any) -> Sequence[Tensor]:
        """The factors of each vector of the tile."""
        raise NotImplementedError

    def combine(self, tile: Tile, state: Any) -> Tensor:
        factors = self.factors(tile, state)
        result = self.shaped(tile.empty())
        for index, vector in enumerate(self.vectors(tile)):
            if index == 0:
                torch.mul(self.shaped(vector), factors[0], out=result)
            else:
                result.add_(self.shaped(vector).mul_(factors[index]))
        result = result.view(tile.shape)
        return result if self.origin is None else result.add_(tile.load(self.origin))

    def wide_products(self, tile: Tile) -> Iterator[Tensor]:
        """Yield the elementwise product of each pair of vectors in float64, in the same buffer."""
        product = self.shaped(tile.empty(torch.float64))
        vectors = [self.shaped(tile.empty(torch.float64).copy_(vector)) for vector in self.vectors(tile)]
        for i, j in self.pairs:
            yield torch.mul(vectors[i], vectors[j], out=product)


class RowCombination(SliceCombination):
    """A combination with separate coefficients for each row."""

    unit = Unit.ROW
    reductions = 0

    def __init__(self, inputs: Inputs, origin: int | None, coefficients: Coefficients) -> None:
        super().__init__(inputs, origin, coefficients)
        self.workspace_per_element = 4 + 2 * len(self.indices)

    def factors(self, tile: Tile, state: Any) -> Sequence[Tensor]:
        mark = tile.workspace.mark()
        sums = [pairwise_fold(product)[:, 0].tolist() for product in self.wide_products(tile)]
        tile.workspace.release(mark)
        return _tensors([self.solve(row) for row in zip(*sums, strict=True)], tile, (-1, 1))


class ColumnCombination(SliceCombination):
    """A combination with separate coefficients for each column, where a row is a slice along the first dimension."""

    def __init__(self, inputs: Inputs, origin: int | None, coefficients: Coefficients) -> None:
        super().__init__(inputs, origin, coefficients)
        slices = inputs.shape[0] if inputs.shape else 1
        self.workspace_per_element = 4 + 2 * len(self.indices)
        self.width = max(1, math.prod(inputs.shape[1:]))
        self.height = max(32, -(-slices // 128))  # at most 128 blocks, which bounds the partial sums

    @property
    def alignment(self) -> int:
        return self.height * self.width

    def shaped(self, buffer: Tensor) -> Tensor:
        return buffer.view(-1, self.width)

    def reduce(self, index: int, tile: Tile, state: Any) -> list[Tensor]:
        sums = [
            torch.stack([pairwise_fold(block.t())[:, 0] for block in torch.split(product, self.height)])
            for product in self.wide_products(tile)
        ]
        return [torch.stack(sums).cpu()]

    def finish(self, index: int, merged: list[Tensor] | None, state: Any) -> Any:
        if not merged:
            return []
        blocks = torch.cat(merged, 1).permute(2, 0, 1).tolist()
        return [self.solve([total(sums) for sums in column]) for column in blocks]

    def factors(self, tile: Tile, state: Any) -> Sequence[Tensor]:
        return _tensors(state, tile, (1, -1))


def _tensors(coefficients: Sequence[Vector], tile: Tile, shape: tuple[int, int]) -> Sequence[Tensor]:
    """Convert coefficients to one tensor per vector, in the work dtype and on the tile's device."""
    table = torch.tensor(coefficients, dtype=torch.float64).to(tile.workspace.dtype).to(tile.inputs[0].device)
    return [column.view(shape) for column in table.unbind(1)]
