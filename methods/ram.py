"""RAM, reinforced agent merging: what only one model changed is added whole, what several changed is averaged."""

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
    """The base plus what the models changed: the mean change over those that changed the element.

    An element of x_i - base counts as changed where its size is above epsilon, and as 0 elsewhere. What one model alone
    changed is added as it is; what several changed, as the mean of their changes.

    Args:
        epsilon: the size of a difference from the base that doesn't count as a change yet.
    """

    workspace_per_element = 6
    propagates_nonfinite = True

    def __init__(self, inputs: Inputs, *, epsilon: NonNegative = 1e-5) -> None:
        super().__init__(inputs)
        self.epsilon = epsilon

    def changed(self, delta: Tensor, out: Tensor) -> Tensor:
        """1 where a task vector counts as changed, 0 elsewhere."""
        return torch.gt(torch.abs(delta, out=out), self.epsilon, out=out)

    def combine(self, tile: Tile, state: Any) -> Tensor:
        sums, number, mask = tile.empty().zero_(), tile.empty().zero_(), tile.empty()
        for delta in deltas(self.inputs, tile):
            number.add_(self.changed(delta, mask))
            sums.add_(delta.mul_(mask))
        return sums.div_(number.clamp_(min=1)).add_(tile.load(base_of(self.inputs)))


@merge_method("ramplus_tl", paper=PAPER, base=Base.REQUIRED)
class RAMPlus(RAM):
    """RAM, where what a model alone changed is strengthened, the more it shares of its other changes.

    As ram, but what model i alone changed is multiplied by 1 + r min(s_i / u_i, alpha), where u_i elements of the
    tensor are changed by it alone and s_i by it and others. (In the paper these are counts over the whole model.)

    Args:
        epsilon: the size of a difference from the base that doesn't count as a change yet.
        r: how much is added at a ratio of 1.
        alpha: the highest ratio that counts.
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
        """How many models changed each element."""
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
