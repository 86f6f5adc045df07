"""The pieces of the task-vector methods: differences from a base, made sparse, weighted, elected, summed.

    delta_i = x_i - base
    delta_i = sparsify(delta_i), times what restores its size where that is asked for, times the weight
    out = base + lambda sum_i delta_i, divided by the weights where that is asked for

With an election, only the deltas that agree with the sign of the sum count, element by element.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .kernel.block_sums import BlockSums, total
from .kernel.contract import BLOCK, Inputs, Kernel, Unit, base_of
from .kernel.lazy import torch
from .kernel.lazy_ops import ops

if TYPE_CHECKING:
    from torch import Tensor

    from .kernel.tile import Tile


def deltas(
    inputs: Inputs,
    tile: Tile,
    *,
    indices: Sequence[int] | None = None,
    buffers: Sequence[Tensor] = (),
    absolute: bool = False,
) -> Iterator[Tensor]:
    """The task vectors in the work dtype, in recipe order.

    Args:
        inputs: of the tensor.
        tile: of these.
        indices: of which inputs; of all but the base if None.
        buffers: one for each. Without any, all are made in the same, and each is lost with the next.
        absolute: whether only the sizes of the elements are wanted.
    """
    mark = tile.workspace.mark()
    base = tile.load(base_of(inputs))
    others = inputs.others if indices is None else indices
    buffers = buffers or [tile.empty()] * len(others)
    for buffer, index in zip(buffers, others, strict=True):
        yield ops.difference(buffer, tile.inputs[index], base, absolute)
    tile.workspace.release(mark)


def magnitudes(delta: Tensor, tile: Tile) -> Tensor:
    """The sizes of a task vector's elements in float32, in a new buffer."""
    return tile.empty(torch.float32).copy_(delta).abs_()


def in_float32(sizes: Tensor, tile: Tile) -> Tensor:
    """Sizes rounded to float32; a new buffer only where they are float64."""
    return sizes if sizes.dtype is torch.float32 else tile.empty(torch.float32).copy_(sizes)


def elected_mean(
    terms: Sequence[Tensor],
    divisors: Sequence[float] | None,
    tile: Tile,
    *,
    scales: Sequence[float] | None = None,
    factors: Sequence[float] | None = None,
    floor: float = 0.0,
) -> Tensor:
    """The sum of the terms that have the sign of the sum of all, element by element; plus where that is 0.

    Args:
        terms: the task vectors; they are used up, and the result lies in the first.
        divisors: where given, the result is divided by the sum of those of the terms that were added.
        tile: that they belong to.
        scales: what each term is multiplied by before the election.
        factors: what each term is multiplied by after the election.
        floor: the least divisor; 0 stands for 1 where the divisor is exactly 0.
    """
    mark = tile.workspace.mark()
    sign, agree, divisor = (tile.empty() for _ in range(3))
    bits = [ops.bits(term) for term in (*terms, sign)]
    weighting = list(scales or ()), list(divisors or ()), list(factors or ())
    ops.sign_consensus_sum(terms[0], list(terms), bits[:-1], *weighting, floor, sign, bits[-1], agree, divisor)
    tile.workspace.release(mark)
    return terms[0]


class Sparsifier:
    """Sets elements of the task vectors to zero; this one none.

    Its reductions come before those of the method, and their state is its own.

    Args:
        inputs: of the tensor.
    """

    unit = Unit.ELEMENT
    reductions = 0
    buffers = 0.0
    random = False
    drops = False

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def needed(self, index: int, state: Any) -> bool:
        """As `Kernel.needed`."""
        return True

    def reduce(self, index: int, tile: Tile, state: Any) -> Any:
        """As `Kernel.reduce`."""
        raise NotImplementedError

    def merge(self, index: int, merged: Any, partial: Any) -> Any:
        """As `Kernel.merge`."""
        raise NotImplementedError

    def finish(self, index: int, merged: Any, state: Any) -> Any:
        """As `Kernel.finish`."""
        raise NotImplementedError

    def apply(self, delta: Tensor, place: int, tile: Tile, state: Any) -> None:
        """Make the task vector of ``inputs.others[place]`` sparse, in place, within `buffers` of workspace."""

    def vectors(self, tile: Tile, buffers: Sequence[Tensor], state: Any) -> Iterator[Tensor]:
        """The sparse task vectors, in recipe order; of two in the same buffer the first is lost with the second."""
        for place, delta in enumerate(deltas(self.inputs, tile, buffers=buffers)):
            self.apply(delta, place, tile, state)
            yield delta

    def add_sizes(self, tile: Tile, sums: BlockSums, state: Any) -> None:
        """Add up the sizes of each task vector's elements, before and after it was made sparse."""
        for place, delta in enumerate(deltas(self.inputs, tile, absolute=True)):  # none looks at a sign
            sums.add(delta)
            self.apply(delta, place, tile, state)
            sums.add(delta)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the reductions of `TaskVectors` found.

    Args:
        sparse: the state of the sparsifier.
        sizes: of each task vector, what restores its L1 norm.
    """

    sparse: Any = None
    sizes: Sequence[float] | None = None


class TaskVectors(Kernel):
    """The base plus a combination of task vectors.

    Args:
        inputs: of the tensor.
        sparsifier: makes each task vector sparse.
        weight: of each input; the base's is not used.
        elect: whether only what agrees with the sign of the weighted sum counts.
        normalize: whether the sum is divided by the sum of the weights (of the agreeing ones).
        rescale: the least L1 norm that is restored after a task vector was made sparse; None if none is.
        divisor_eps: the least sum of all weights that is divided by, where there is no election.
        factor: what the combination is multiplied by.
    """

    propagates_nonfinite = True  # zeros are made by multiplication

    def __init__(
        self,
        inputs: Inputs,
        sparsifier: Sparsifier,
        *,
        weight: Sequence[float],
        elect: bool,
        normalize: bool,
        rescale: float | None,
        divisor_eps: float,
        factor: float,
    ) -> None:
        super().__init__(inputs)
        self.sparsifier = sparsifier
        self.weights = [weight[i] for i in inputs.others]
        self.elect = elect
        self.normalize = normalize
        self.rescale = rescale if sparsifier.drops else None
        divisor = math.fsum(self.weights) if normalize and not elect else 1.0
        self.factor = factor / divisor if abs(divisor) >= divisor_eps and divisor else factor
        if elect and self.weights[0] > 0 and len(set(self.weights)) == 1:  # they decide nothing, and cancel in a mean
            self.factor *= 1.0 if normalize else self.weights[0]
            self.weights = [1.0] * len(self.weights)
        self.unit = sparsifier.unit
        self.random = sparsifier.random
        self.reductions = sparsifier.reductions + (self.rescale is not None)
        count = len(self.weights)
        combining = count + max(1 + sparsifier.buffers, 3) if elect else 3 + sparsifier.buffers
        rescaling = 2 + sparsifier.buffers + BlockSums.size(2 * count)
        self.buffers = max(combining, rescaling if self.reductions else 0)

    @property
    def alignment(self) -> int:
        columns = self.inputs.columns if self.unit is Unit.ROW else 1
        return -(-BLOCK // columns) * columns if columns else BLOCK

    def needed(self, index: int, state: Prepared | None) -> bool:
        if index >= self.sparsifier.reductions:
            return True
        return self.sparsifier.needed(index, state.sparse if state else None)

    def reduce(self, index: int, tile: Tile, state: Prepared | None) -> Any:
        sparse = state.sparse if state else None
        if index < self.sparsifier.reductions:
            return self.sparsifier.reduce(index, tile, sparse)
        sums = BlockSums(2 * len(self.weights), tile.elements, self.alignment, tile.workspace)
        self.sparsifier.add_sizes(tile, sums, sparse)
        return [sums.partial()]

    def merge(self, index: int, merged: Any, partial: Any) -> Any:
        if index < self.sparsifier.reductions:
            return self.sparsifier.merge(index, merged, partial)
        return super().merge(index, merged, partial)

    def finish(self, index: int, merged: Any, state: Prepared | None) -> Prepared:
        sparse = state.sparse if state else None
        if index < self.sparsifier.reductions:
            return Prepared(self.sparsifier.finish(index, merged, sparse))
        sums = [total(blocks) for blocks in torch.cat(merged, 1).tolist()] if merged else []
        pairs = zip(sums[::2], sums[1::2], strict=True)
        return Prepared(sparse, [l1_rescale(before, after, self.rescale or 0.0) for before, after in pairs])

    def combine(self, tile: Tile, state: Prepared | None) -> Tensor:
        state = state or Prepared()
        factors = [w * size for w, size in zip(self.weights, state.sizes or [1.0] * len(self.weights), strict=True)]
        if not (self.elect or self.sparsifier.drops):
            base = tile.load(base_of(self.inputs))
            inputs = [tile.inputs[i] for i in self.inputs.others]
            result = ops.weighted_sum(tile.empty(), tile.empty(), inputs, factors, base)
            return ops.add_to_base(result, self.factor, base, base)
        buffers = [tile.empty() for _ in (self.weights if self.elect else self.weights[:2])]
        buffers += buffers[1:] * (len(self.weights) - len(buffers))  # all but the first of them in turn
        for place, delta in enumerate(self.sparsifier.vectors(tile, buffers, state.sparse)):
            if not self.elect:
                ops.accumulate(buffers[0], delta, factors[place], place == 0)
        if self.elect:
            elected_mean(buffers, self.weights if self.normalize else None, tile, scales=factors)
        return ops.add_to_base(buffers[0], self.factor, tile.empty(), tile.inputs[base_of(self.inputs)])


def l1_rescale(before: float, after: float, least: float) -> float:
    """What gives a task vector its L1 norm back."""
    return before / after if not (before < least or after < least or after == 0) else 1.0
