"""SCE: select by variance, calculate weights, erase what disagrees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .kernel.block_sums import BlockSums, total
from .kernel.contract import BLOCK, Base, Fraction, Inputs, Kernel, NonNegative, base_of, merge_method
from .kernel.lazy import torch
from .kernel.lazy_ops import ops
from .kernel.selection import Selection, SelectionState, Target, Threshold
from .task_vectors import deltas, elected_mean, in_float32

if TYPE_CHECKING:
    from torch import Tensor

    from .kernel.tile import Tile


@dataclass(frozen=True, slots=True)
class SCEState:
    """What the reductions found.

    Args:
        progress: of the selection.
        weights: of the models.
    """

    progress: SelectionState | None = None
    weights: Sequence[float] = ()

    @property
    def cut(self) -> Threshold | None:
        """Which variances are high enough; None where all are."""
        return self.progress.targets[0].cut if self.progress else None


@merge_method("sce", paper="https://arxiv.org/abs/2408.07990", base=Base.REQUIRED)
class SCE(Kernel):
    """Select the elements that vary most between models, weigh the models by their squares, and erase the minority.

    d_i = x_i - base where the variance over the models is among the select_topk highest that aren't 0, else 0;
    w_i = mean(d_i^2) / sum_j mean(d_j^2); the sign of each element is that of sum_i d_i, plus where that is 0;
    out = base + (sum of the w_i d_i with that sign) / (sum of their w_i).

    Args:
        select_topk: the share of the varying elements that are selected; 1 selects all elements.
        weight_eps: all weights are equal where the sum of the mean squares is below this.
        divisor_eps: the least sum of weights that is divided by.
    """

    propagates_nonfinite = True

    def __init__(
        self,
        inputs: Inputs,
        *,
        select_topk: Fraction = 1.0,
        weight_eps: NonNegative = 1e-6,
        divisor_eps: NonNegative = 1e-6,
    ) -> None:
        super().__init__(inputs)
        self.count = len(inputs.others)
        self.weight_eps = weight_eps
        self.divisor_eps = divisor_eps
        self.elements = inputs.rows * inputs.columns
        self.selection: Selection | None = None
        if select_topk < 1:
            target = Target(stream=0, rank=None, share=select_topk)
            self.selection = Selection(self.elements, [target], self.variances)
        self.selecting = self.selection.reductions if self.selection else 0
        self.reductions = self.selecting + 1
        self.workspace_per_element = self.count + 4.25 + BlockSums.size(self.count)

    def variances(self, tile: Tile) -> Iterator[Tensor]:
        """The variance of each element over the models, times a number; exactly 0 where all are equal."""
        mark = tile.workspace.mark()
        first, *others = (tile.load(i) for i in self.inputs.others)
        sums = tile.empty().zero_()
        for other in others:
            sums.add_(other.sub_(first))
        variance = torch.mul(sums, sums, out=first)
        for other in others:  # count times its distance from the mean: of what has few bits, exact
            variance.add_(other.mul_(self.count).sub_(sums).square_())
        yield in_float32(variance, tile)
        tile.workspace.release(mark)

    def selected(self, tile: Tile, state: SCEState | None) -> list[Tensor]:
        """The task vectors' selected elements, the others 0, each in a buffer of its own."""
        mask = None
        if state and state.threshold:
            mask = tile.empty(torch.float32)
            for variance in self.variances(tile):
                state.threshold.mask(variance, tile.element, out=mask)
        vectors = [tile.empty() for _ in self.inputs.others]
        for delta in deltas(self.inputs, tile, buffers=vectors):
            if mask is not None:
                delta.mul_(mask)
        return vectors

    def needed(self, index: int, state: SCEState | None) -> bool:
        if self.selection is None or state is None or state.progress is None or index == self.selecting:
            return True
        return self.selection.needed(index, state.progress)

    def reduce(self, index: int, tile: Tile, state: SCEState | None) -> list[Any]:
        if self.selection and index < self.selecting:
            return self.selection.reduce(index, tile, state.progress if state else None)
        sums = BlockSums(self.count, tile.elements, BLOCK, tile.workspace)
        for vector in self.selected(tile, state):
            sums.add(vector.square_())
        return [sums.partial()]

    def merge(self, index: int, merged: Any, partial: Any) -> Any:
        if self.selection and index < self.selecting:
            return self.selection.merge(merged, partial)
        return super().merge(index, merged, partial)

    def finish(self, index: int, merged: Any, state: SCEState | None) -> SCEState:
        progress = state.progress if state else None
        if self.selection and index < self.selecting:
            return SCEState(self.selection.finish(index, merged, progress))
        squares = [total(blocks) / self.elements for blocks in torch.cat(merged, 1).tolist()] if merged else []
        whole = total(squares)
        if whole < self.weight_eps or not whole:
            return SCEState(progress, [1 / self.count] * self.count)
        return SCEState(progress, [square / whole for square in squares])

    def combine(self, tile: Tile, state: SCEState) -> Tensor:
        vectors = self.selected(tile, state)
        elected_mean(vectors, state.weights, tile, factors=state.weights, floor=self.divisor_eps)
        return ops.add_to_base(vectors[0], 1.0, tile.empty(), tile.inputs[base_of(self.inputs)])
