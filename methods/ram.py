"""RAM (reinforced agent merging): adds changes of a single model in full and averages changes of several models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .kernel.contract import Base, Inputs, Kernel, NonNegative, base_of, merge_method
from .kernel.lazy import torch
from .task_vectors import deltas

if TYPE_CHECKING:
    from torch import Tensor

    from .kernel.tile import Tile

PAPER = "https://arxiv.org/abs/2601.13572"


@merge_method("ram", paper=PAPER, base=Base.REQUIRED)
class RAM(Kernel):
    """The base plus, for each element, the mean change over the models that changed it.

    A model changed an element if |x_i - base| is above epsilon; smaller differences count as 0. A change by a single
    model is added in full, changes by several models are averaged.

    Args:
        epsilon: largest absolute difference from the base that does not count as a change.
    """

    workspace_per_element = 6
    propagates_nonfinite = True

    def __init__(self, inputs: Inputs, *, epsilon: NonNegative = 1e-5) -> None:
        super().__init__(inputs)
        self.epsilon = epsilon

    def changed(self, delta: Tensor, out: Tensor) -> Tensor:
        """Set `out` to 1 for changed elements of a task vector, else to 0."""
        return torch.gt(torch.abs(delta, out=out), self.epsilon, out=out)

    def combine(self, tile: Tile, state: Any) -> Tensor:
        sums, number, mask = tile.empty().zero_(), tile.empty().zero_(), tile.empty()
        for delta in deltas(self.inputs, tile):
            number.add_(self.changed(delta, mask))
            sums.add_(delta.mul_(mask))
        return sums.div_(number.clamp_(min=1)).add_(tile.load(base_of(self.inputs)))


@merge_method("ramplus_tl", paper=PAPER, base=Base.REQUIRED)
class RAMPlus(RAM):
    """RAM with amplified changes of single models, by the ratio of the model's shared to its unshared changes.

    As ram, but changes by model i alone are multiplied by 1 + r min(s_i / u_i, alpha), where model i alone changed u_i
    elements of the tensor, and model i and others changed s_i. (The paper counts the elements of all tensors.)

    Args:
        epsilon: largest absolute difference from the base that does not count as a change.
        r: amplification for a ratio of 1.
        alpha: maximum ratio.
    """

    reductions = 1
    workspace_per_element = 6

    def __init__(
        self, inputs: Inputs, *, epsilon: NonNegative = 1e-5, r: NonNegative = 0.1, alpha: NonNegative = 0.2
    ) -> None:
        super().__init__(inputs, epsilon=epsilon)
        self.r = r
        self.alpha = alpha

    def number(self, tile: Tile) -> Tensor:
        """The number of models that changed each element."""
        number = tile.empty().zero_()
        mark = tile.workspace.mark()
        mask = tile.empty()
        for delta in deltas(self.inputs, tile):
            number.add_(self.changed(delta, mask))
        tile.workspace.release(mark)
        return number

    def reduce(self, index: int, tile: Tile, state: Any) -> Tensor:
        alone = self.number(tile)
        torch.eq(alone, 1, out=alone)
        mask = tile.empty()
        counts = []
        for delta in deltas(self.inputs, tile):
            changes = torch.count_nonzero(self.changed(delta, mask))
            counts.append(torch.stack([changes, torch.count_nonzero(mask.mul_(alone))]))
        return torch.stack(counts).cpu()

    def finish(self, index: int, merged: Tensor | None, state: Any) -> Sequence[float]:
        counts = merged.tolist() if merged is not None else []
        return [self.r * min((changes - alone) / alone, self.alpha) if alone else 0.0 for changes, alone in counts]

    def combine(self, tile: Tile, state: Sequence[float]) -> Tensor:
        number = self.number(tile)
        sums, mask, alone = tile.empty().zero_(), tile.empty(), tile.empty()
        torch.le(number, 1, out=alone)
        for gain, delta in zip(state, deltas(self.inputs, tile), strict=True):
            delta.mul_(self.changed(delta, mask))
            sums.add_(delta.mul_(torch.mul(alone, gain, out=mask).add_(1)))
        return sums.div_(number.clamp_(min=1)).add_(tile.load(base_of(self.inputs)))
