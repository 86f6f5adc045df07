"""The building blocks of task-vector methods: differences from a base that are sparsified, weighted and summed.

    delta_i = x_i - base
    delta_i = w_i * sparsify(delta_i), optionally rescaled to its L1 norm before sparsification
    out = base + lambda * sum_i delta_i, optionally divided by the sum of the weights

With an election, each element of the sum includes only the deltas that have the sign of the sum of all deltas.
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
        inputs: inputs of the output tensor.
        tile: tile of these inputs.
        indices: indices of the inputs; None for all except the base.
        buffers: one buffer per task vector; if empty, all share one buffer and each overwrites the previous one.
        absolute: whether to return absolute values.
    """
    mark = tile.workspace.mark()
    base = tile.load(base_of(inputs))
    others = inputs.others if indices is None else indices
    buffers = buffers or [tile.empty()] * len(others)
    for buffer, index in zip(buffers, others, strict=True):
        yield ops.difference(buffer, tile.inputs[index], base, absolute)
    tile.workspace.release(mark)


def magnitudes(delta: Tensor, tile: Tile) -> Tensor:
    """The magnitudes of a task vector in float32, in a new buffer."""
    return tile.empty(torch.float32).copy_(delta).abs_()


def in_float32(values: Tensor, tile: Tile) -> Tensor:
    """Round values to float32, in a new buffer if they are float64."""
    return values if values.dtype is torch.float32 else tile.empty(torch.float32).copy_(values)


def elected_mean(
    terms: Sequence[Tensor],
    divisors: Sequence[float] | None,
    tile: Tile,
    *,
    scales: Sequence[float] | None = None,
    factors: Sequence[float] | None = None,
    floor: float = 0.0,
) -> Tensor:
    """Sum the terms that have the elected sign: for each element the sign of the sum of all terms, or plus if it is 0.

    Args:
        terms: task vectors, which are overwritten; the result is in the first one.
        divisors: divisor of each term, or None; an element is divided by the sum of the divisors of its terms.
        tile: tile of the task vectors.
        scales: factor of each term before the election.
        factors: factor of each term after the election.
        floor: minimum divisor; with 0 an exact zero counts as 1.
    """
    mark = tile.workspace.mark()
    sign, agree, divisor = (tile.empty() for _ in range(3))
    bits = [ops.bits(term) for term in (*terms, sign)]
    weighting = list(scales or ()), list(divisors or ()), list(factors or ())
    ops.sign_consensus_sum(terms[0], list(terms), bits[:-1], *weighting, floor, sign, bits[-1], agree, divisor)
    tile.workspace.release(mark)
    return terms[0]


class Sparsifier:
    """Sets elements of the task vectors to zero; the base class keeps all.

    Its reductions run before those of the method and have a state of their own.

    Args:
        inputs: inputs of the output tensor.
    """

    unit = Unit.ELEMENT
    reductions = 0
    workspace_per_element = 0.0
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

    def apply(self, delta: Tensor, index: int, tile: Tile, state: Any) -> None:
        """Sparsify the task vector of ``inputs.others[index]`` in place, within `workspace_per_element`."""

    def vectors(self, tile: Tile, buffers: Sequence[Tensor], state: Any) -> Iterator[Tensor]:
        """The sparse task vectors in recipe order; those that share a buffer overwrite each other."""
        for index, delta in enumerate(deltas(self.inputs, tile, buffers=buffers)):
            self.apply(delta, index, tile, state)
            yield delta

    def add_l1_sums(self, tile: Tile, sums: BlockSums, state: Any) -> None:
        """Sum the magnitudes of each task vector before and after sparsification."""
        for index, delta in enumerate(deltas(self.inputs, tile, absolute=True)):  # no sparsifier depends on signs
            sums.add(delta)
            self.apply(delta, index, tile, state)
            sums.add(delta)


@dataclass(frozen=True, slots=True)
class TaskVectorState:
    """The results of the reductions of `TaskVectors`.

    Args:
        sparsifier: state of the sparsifier.
        rescales: factor of each task vector that restores its L1 norm; None if none is restored.
    """

    sparsifier: Any = None
    rescales: Sequence[float] | None = None


class TaskVectors(Kernel):
    """The base plus a combination of task vectors.

    Args:
        inputs: inputs of the output tensor.
        sparsifier: makes each task vector sparse.
        weight: weight of each input; that of the base is ignored.
        elect: whether an element includes only the task vectors with the sign of the weighted sum.
        normalize: whether to divide by the sum of the weights (with an election, of the included ones).
        rescale_eps: minimum L1 norm that is restored after sparsification; None to restore none.
        divisor_eps: minimum sum of weights to divide by, without an election.
        factor: factor of the combination.
    """

    propagates_nonfinite = True  # elements are zeroed by multiplication, which keeps NaN

    def __init__(
        self,
        inputs: Inputs,
        sparsifier: Sparsifier,
        *,
        weight: Sequence[float],
        elect: bool,
        normalize: bool,
        rescale_eps: float | None,
        divisor_eps: float,
        factor: float,
    ) -> None:
        super().__init__(inputs)
        self.sparsifier = sparsifier
        self.weights = [weight[i] for i in inputs.others]
        self.elect = elect
        self.normalize = normalize
        self.rescale_eps = rescale_eps if sparsifier.drops else None
        divisor = math.fsum(self.weights) if normalize and not elect else 1.0
        self.factor = factor / divisor if abs(divisor) >= divisor_eps and divisor else factor
        if (
            elect and self.weights[0] > 0 and len(set(self.weights)) == 1
        ):  # equal weights do not affect the election and cancel in a mean
            self.factor *= 1.0 if normalize else self.weights[0]
            self.weights = [1.0] * len(self.weights)
        self.unit = sparsifier.unit
        self.random = sparsifier.random
        self.reductions = sparsifier.reductions + (self.rescale_eps is not None)
        count = len(self.weights)
        combining = (
            count + max(1 + sparsifier.workspace_per_element, 3) if elect else 3 + sparsifier.workspace_per_element
        )
        rescaling = 2 + sparsifier.workspace_per_element + BlockSums.size(2 * count)
        self.workspace_per_element = max(combining, rescaling if self.reductions else 0)

    @property
    def alignment(self) -> int:
        columns = self.inputs.columns if self.unit is Unit.ROW else 1
        return -(-BLOCK // columns) * columns if columns else BLOCK

    def needed(self, index: int, state: TaskVectorState | None) -> bool:
        if index >= self.sparsifier.reductions:
            return True
        return self.sparsifier.needed(index, state.sparsifier if state else None)

    def reduce(self, index: int, tile: Tile, state: TaskVectorState | None) -> Any:
        sparsifier_state = state.sparsifier if state else None
        if index < self.sparsifier.reductions:
            return self.sparsifier.reduce(index, tile, sparsifier_state)
        sums = BlockSums(2 * len(self.weights), tile.elements, self.alignment, tile.workspace)
        self.sparsifier.add_l1_sums(tile, sums, sparsifier_state)
        return [sums.partial()]

    def merge(self, index: int, merged: Any, partial: Any) -> Any:
        if index < self.sparsifier.reductions:
            return self.sparsifier.merge(index, merged, partial)
        return super().merge(index, merged, partial)

    def finish(self, index: int, merged: Any, state: TaskVectorState | None) -> TaskVectorState:
        sparsifier_state = state.sparsifier if state else None
        if index < self.sparsifier.reductions:
            return TaskVectorState(self.sparsifier.finish(index, merged, sparsifier_state))
        sums = [total(blocks) for blocks in torch.cat(merged, 1).tolist()] if merged else []
        pairs = zip(sums[::2], sums[1::2], strict=True)
        return TaskVectorState(
            sparsifier_state, [l1_rescale(before, after, self.rescale_eps or 0.0) for before, after in pairs]
        )

    def combine(self, tile: Tile, state: TaskVectorState | None) -> Tensor:
        state = state or TaskVectorState()
        rescales = state.rescales or [1.0] * len(self.weights)
        factors = [w * rescale for w, rescale in zip(self.weights, rescales, strict=True)]
        if not (self.elect or self.sparsifier.drops):
            base = tile.load(base_of(self.inputs))
            inputs = [tile.inputs[i] for i in self.inputs.others]
            result = ops.weighted_sum(tile.empty(), tile.empty(), inputs, factors, base)
            return ops.add_to_base(result, self.factor, base, base)
        buffers = [tile.empty() for _ in (self.weights if self.elect else self.weights[:2])]
        buffers += buffers[1:] * (len(self.weights) - len(buffers))  # the first is the sum, the others alternate
        for index, delta in enumerate(self.sparsifier.vectors(tile, buffers, state.sparsifier)):
            if not self.elect:
                ops.accumulate(buffers[0], delta, factors[index], index == 0)
        if self.elect:
            elected_mean(buffers, self.weights if self.normalize else None, tile, scales=factors)
        return ops.add_to_base(buffers[0], self.factor, tile.empty(), tile.inputs[base_of(self.inputs)])


def l1_rescale(before: float, after: float, eps: float) -> float:
    """The factor that restores a task vector's L1 norm; 1 if a norm is below `eps`."""
    return before / after if not (before < eps or after < eps or after == 0) else 1.0
