"""SCE: select elements by variance, calculate model weights, erase elements with the minority sign."""

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
    """The results of the reductions.

    Args:
        selection: state of the selection.
        weights: weight of each model.
    """

    selection: SelectionState | None = None
    weights: Sequence[float] = ()

    @property
    def threshold(self) -> Threshold | None:
        """The threshold of selected variances; None to select all elements."""
        return self.selection.targets[0].threshold if self.selection else None


@merge_method("sce", paper="https://arxiv.org/abs/2408.07990", base=Base.REQUIRED)
class SCE(Kernel):
    """Select the elements with the highest variance, weight the models, and erase elements with the minority sign.

    d_i = x_i - base for the fraction select_topk of the nonzero variances over the models that are highest, else 0.
    w_i = mean(d_i^2) / sum_j mean(d_j^2). The elected sign of an element is that of sum_i d_i, or plus if the sum is 0.
    out = base + (sum of the w_i d_i with that sign) / (sum of their w_i)

    Args:
        select_topk: fraction of the elements with nonzero variance that is selected; 1 selects all elements.
        weight_eps: sum of the mean squares below which all models have equal weights.
        divisor_eps: minimum sum of weights to divide by.
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
        """Yield the variance of each element over the models, up to a constant factor; exactly 0 if all are equal."""
        mark = tile.workspace.mark()
        first, *others = (tile.load(i) for i in self.inputs.others)
        sums = tile.empty().zero_()
        for other in others:
            sums.add_(other.sub_(first))
        variance = torch.mul(sums, sums, out=first)
        for other in others:  # count * (distance from the mean), exact for values of few bits
            variance.add_(other.mul_(self.count).sub_(sums).square_())
        yield in_float32(variance, tile)
        tile.workspace.release(mark)

    def selected(self, tile: Tile, state: SCEState | None) -> list[Tensor]:
        """The task vectors with unselected elements set to 0, each in its own buffer."""
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
        if self.selection is None or state is None or state.selection is None or index == self.selecting:
            return True
        return self.selection.needed(index, state.selection)

    def reduce(self, index: int, tile: Tile, state: SCEState | None) -> list[Any]:
        if self.selection and index < self.selecting:
            return self.selection.reduce(index, tile, state.selection if state else None)
        sums = BlockSums(self.count, tile.elements, BLOCK, tile.workspace)
        for vector in self.selected(tile, state):
            sums.add(vector.square_())
        return [sums.partial()]

    def merge(self, index: int, merged: Any, partial: Any) -> Any:
        if self.selection and index < self.selecting:
            return self.selection.merge(merged, partial)
        return super().merge(index, merged, partial)

    def finish(self, index: int, merged: Any, state: SCEState | None) -> SCEState:
        selection_state = state.selection if state else None
        if self.selection and index < self.selecting:
            return SCEState(self.selection.finish(index, merged, selection_state))
        squares = [total(blocks) / self.elements for blocks in torch.cat(merged, 1).tolist()] if merged else []
        square_sum = total(squares)
        if square_sum < self.weight_eps or not square_sum:
            return SCEState(selection_state, [1 / self.count] * self.count)
        return SCEState(selection_state, [square / square_sum for square in squares])

    def combine(self, tile: Tile, state: SCEState) -> Tensor:
        vectors = self.selected(tile, state)
        elected_mean(vectors, state.weights, tile, factors=state.weights, floor=self.divisor_eps)
        return ops.add_to_base(vectors[0], 1.0, tile.empty(), tile.inputs[base_of(self.inputs)])
