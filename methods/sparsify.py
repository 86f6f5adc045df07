"""The ways to make a task vector sparse: by size, within sizes, at random, at random by rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .contract import Inputs, MethodError, Unit
from .lazy import numpy as np
from .lazy import torch
from .randomness import hashes, threshold
from .selection import ALL, NONE, Cut, Progress, Selection, Target
from .task_vectors import Sparsifier, deltas, magnitudes

if TYPE_CHECKING:
    from torch import Tensor

    from .tile import Tile


class Between(Sparsifier):
    """Keeps the elements from one rank of size to another, and zeros the others.

    Args:
        inputs: of the tensor.
        ranks: for each task vector, how many of the largest are dropped, and how many are left after dropping
            the smallest; None to keep all.
    """

    buffers = 2.0

    def __init__(self, inputs: Inputs, ranks: Sequence[tuple[int, int] | None]) -> None:
        super().__init__(inputs)
        size = inputs.rows * inputs.columns
        self.ranks = [(0, size) if pair is None else pair for pair in ranks]
        bounds = [
            (place, rank) for place, pair in enumerate(self.ranks) for rank in pair if 0 < rank < size
        ]
        self.places = sorted({place for place, _ in bounds})
        self.targets = dict(zip(bounds, range(len(bounds)), strict=False))
        targets = [Target(self.places.index(place), rank) for place, rank in self.targets]
        self.selection = Selection(size, targets, self._streams)
        self.reductions = self.selection.reductions if targets else 0
        self.size = size

    def _streams(self, tile: Tile) -> Iterator[Tensor]:
        for delta in deltas(self.inputs, tile, indices=[self.inputs.others[place] for place in self.places]):
            mark = tile.workspace.mark()
            yield magnitudes(delta, tile, keep=False)
            tile.workspace.release(mark)

    def needed(self, index: int, state: Progress | None) -> bool:
        return state is None or self.selection.needed(index, state)

    def reduce(self, index: int, tile: Tile, state: Progress | None) -> Any:
        return self.selection.reduce(index, tile, state)

    def merge(self, index: int, merged: Any, partial: Any) -> Any:
        return self.selection.merge(merged, partial)

    def finish(self, index: int, merged: Any, state: Progress | None) -> Progress:
        return self.selection.finish(index, merged, state)

    def _cut(self, place: int, rank: int, state: Progress | None) -> Cut:
        if not 0 < rank < self.size:
            return NONE if rank <= 0 else ALL
        cut = state.targets[self.targets[place, rank]].cut if state else None
        assert cut is not None
        return cut

    def apply(self, delta: Tensor, place: int, tile: Tile, state: Progress | None) -> None:
        dropped, kept = (self._cut(place, rank, state) for rank in self.ranks[place])
        if kept is ALL and dropped is NONE:
            return
        mark = tile.workspace.mark()
        sizes = magnitudes(delta, tile)
        if dropped is NONE:
            mask = kept.mask(sizes, tile.element, out=sizes)
        else:
            outliers = dropped.mask(sizes, tile.element, out=tile.empty(torch.float32))
            mask = kept.mask(sizes, tile.element, out=sizes).sub_(outliers)
        delta.mul_(mask)
        tile.workspace.release(mark)


def largest(inputs: Inputs, density: Sequence[float]) -> Sparsifier:
    """Keeps the given share of the elements of each task vector, the largest ones: at least one."""
    size = inputs.rows * inputs.columns
    return Between(inputs, [_all_or_none(density[i], size) or (0, max(1, int(density[i] * size))) for i in inputs.others])


def middling(inputs: Inputs, density: Sequence[float], gamma: Sequence[float]) -> Sparsifier:
    """Drops the share gamma, the largest ones, and keeps the share density of those that follow: where there are too
    few of these, fewer are dropped."""
    size = inputs.rows * inputs.columns
    ranks = []
    for i in inputs.others:
        kept = int(density[i] * size)
        dropped = min(int(gamma[i] * size), size - kept)
        ranks.append(_all_or_none(density[i], size) or (dropped, dropped + kept))
    return Between(inputs, ranks)


def _all_or_none(density: float, size: int) -> tuple[int, int] | None:
    if density >= 1:
        return 0, size
    return (0, 0) if density <= 0 else None
