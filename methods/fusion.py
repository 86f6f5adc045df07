"""Arcee Fusion: takes the most important differences from the other model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .kernel.block_sums import pairwise_fold
from .kernel.contract import Absent, Base, Finite, Inputs, Kernel, Positive, Unit, base_of, merge_method
from .kernel.lazy import numpy as np
from .kernel.lazy import on_cpu, torch
from .kernel.selection import Selection, SelectionState, Target

if TYPE_CHECKING:
    from torch import Tensor

    from .kernel.tile import Tile


@merge_method(
    "arcee_fusion",
    paper="https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration",
    base=Base.REQUIRED,
    maximum=1,
    absent=Absent.SINGLE,
)
class ArceeFusion(Kernel):
    """The base with the most important elements of the other model.

    The importance of an element is |x - base| times the divergence KL(softmax(x) || softmax(base)) of its row. out = x
    for an importance of at least Q2 + iqr_factor (Q3 - Q1), else the base. Q1, Q2 and Q3 are the quartiles of the
    importance in the tensor: the elements at floor(q (n - 1)) in ascending order. Because of exp and log, the bytes
    depend on the kind of device and on the CPU's instruction set.

    Args:
        iqr_factor: distance above the median, in interquartile ranges, from which an element is taken.
        eps: number that is added to each probability.
    """

    unit = Unit.ROW
    workspace_per_element = 11.25
    propagates_nonfinite = True

    def __init__(self, inputs: Inputs, *, iqr_factor: Finite = 1.5, eps: Positive = 1e-8) -> None:
        super().__init__(inputs)
        self.iqr_factor = iqr_factor
        self.eps = eps
        size = inputs.rows * inputs.columns
        ranks = [size - int(q * (size - 1)) for q in (0.25, 0.5, 0.75)] if size else []
        targets = [Target(stream=0, rank=rank, exact=False) for rank in ranks]
        self.selection = Selection(size, targets, self.importances, sampled=False)
        self.reductions = self.selection.reductions

    def importances(self, tile: Tile) -> Iterator[Tensor]:
        """Yield the importance of each element, flat float32."""
        base, other = tile.load(base_of(self.inputs)), tile.load(self.inputs.others[0])
        size = torch.sub(other, base, out=tile.empty()).abs_()
        p, log_q, work = (tile.empty(torch.float64) for _ in range(3))
        logarithm(self.softmax(log_q.copy_(base), work))
        self.softmax(p.copy_(other), work)
        log_p = logarithm(work.copy_(p))
        divergence = pairwise_fold(log_p.sub_(log_q).mul_(p)).clamp_(min=0)  # negative only because of rounding
        yield size.mul_(divergence.to(size.dtype)).to(torch.float32).view(-1).abs_()

    def softmax(self, values: Tensor, work: Tensor) -> Tensor:
        """Compute the softmax of each row plus `eps` in place."""
        exponential(values.sub_(values.amax(dim=-1, keepdim=True)))
        return values.div_(pairwise_fold(work.copy_(values))).add_(self.eps)

    def needed(self, index: int, state: SelectionState | None) -> bool:
        return state is None or self.selection.needed(index, state)

    def reduce(self, index: int, tile: Tile, state: SelectionState | None) -> Any:
        return self.selection.reduce(index, tile, state)

    def merge(self, index: int, merged: Any, partial: Any) -> Any:
        return self.selection.merge(merged, partial)

    def finish(self, index: int, merged: Any, state: SelectionState | None) -> SelectionState:
        return self.selection.finish(index, merged, state)

    def combine(self, tile: Tile, state: SelectionState) -> Tensor:
        first, median, third = (target.threshold.value if target.threshold else 0.0 for target in state.targets)
        bound = float(np.float32(median + self.iqr_factor * (third - first)))
        mask = tile.empty(torch.float32).view(-1)
        mark = tile.workspace.mark()
        for importance in self.importances(tile):
            torch.ge(importance, bound, out=mask)
        tile.workspace.release(mark)
        base, other = tile.load(base_of(self.inputs)), tile.load(self.inputs.others[0])
        return base.add_(other.sub_(base).mul_(mask.view(tile.shape)))


def exponential(x: Tensor) -> Tensor:
    """Compute exp of float64 values in place, with numpy on the CPU, whose results do not depend on the position."""
    if on_cpu(x):
        np.exp(x.numpy(), out=x.numpy())
        return x
    return x.exp_()


def logarithm(x: Tensor) -> Tensor:
    """Compute the natural logarithm of float64 values in place; see `exponential`."""
    if on_cpu(x):
        np.log(x.numpy(), out=x.numpy())
        return x
    return x.log_()
