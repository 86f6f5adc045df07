"""Sparsifiers of task vectors: by magnitude, without outliers, at random, and at random by rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .kernel.contract import Inputs, MethodError, Unit, base_of
from .kernel.hashing import hashes, masks, probability, scratch, threshold
from .kernel.lazy import on_cpu, torch
from .kernel.lazy_ops import mask_ops, ops
from .kernel.selection import ALL, NONE, Selection, SelectionState, Target, Threshold
from .task_vectors import Sparsifier, deltas, in_float32, magnitudes

if TYPE_CHECKING:
    from torch import Tensor

    from .kernel.block_sums import BlockSums
    from .kernel.tile import Tile


class MagnitudeBand(Sparsifier):
    """Keeps the elements whose rank by magnitude is in a range, and zeros the others.

    Args:
        inputs: inputs of the output tensor.
        ranks: range of each task vector as (start, end): the `start` largest elements are dropped, and the following
            ones up to rank `end` are kept.
    """

    workspace_per_element = 2.0

    def __init__(self, inputs: Inputs, ranks: Sequence[tuple[int, int]]) -> None:
        super().__init__(inputs)
        size = inputs.rows * inputs.columns
        self.ranks = list(ranks)
        self.drops = any(pair != (0, size) for pair in self.ranks)
        bounds = {(index, rank) for index, pair in enumerate(self.ranks) for rank in pair if 0 < rank < size}
        self.targets = {bound: number for number, bound in enumerate(sorted(bounds))}
        self.searched = sorted({index for index, _ in bounds})
        targets = [Target(self.searched.index(index), rank) for index, rank in self.targets]
        self.selection = Selection(size, targets, self._streams)
        self.reductions = self.selection.reductions if targets else 0
        self.size = size

    def _streams(self, tile: Tile) -> Iterator[Tensor]:
        indices = [self.inputs.others[index] for index in self.searched]
        for delta in deltas(self.inputs, tile, indices=indices, absolute=True):
            mark = tile.workspace.mark()
            yield in_float32(delta, tile)
            tile.workspace.release(mark)

    def needed(self, index: int, state: SelectionState | None) -> bool:
        return state is None or self.selection.needed(index, state)

    def reduce(self, index: int, tile: Tile, state: SelectionState | None) -> Any:
        return self.selection.reduce(index, tile, state)

    def merge(self, index: int, merged: Any, partial: Any) -> Any:
        return self.selection.merge(merged, partial)

    def finish(self, index: int, merged: Any, state: SelectionState | None) -> SelectionState:
        return self.selection.finish(index, merged, state)

    def _threshold(self, index: int, rank: int, state: SelectionState | None) -> Threshold:
        if not 0 < rank < self.size:
            return NONE if rank <= 0 else ALL
        threshold = state.targets[self.targets[index, rank]].threshold if state else None
        assert threshold is not None
        return threshold

    def apply(self, delta: Tensor, index: int, tile: Tile, state: SelectionState | None) -> None:
        dropped, kept = (self._threshold(index, rank, state) for rank in self.ranks[index])
        if kept is ALL and dropped is NONE:
            return
        if kept is NONE:
            delta.mul_(0)
            return
        mark = tile.workspace.mark()
        if delta.dtype is torch.float32:
            flat = delta.view(-1)
            minimum = (0, []) if kept is ALL else kept.bounds(flat, tile.element)
            maximum = (0, []) if dropped is NONE else dropped.bounds(flat, tile.element)
            ops.hard_band(flat, tile.workspace.take(tile.elements), *minimum, *maximum)
        else:  # magnitudes are always compared in float32
            absolute = magnitudes(delta, tile)
            mask = tile.empty(torch.float32)
            kept.mask(absolute, tile.element, out=mask)
            if dropped is not NONE:
                mask.sub_(dropped.mask(absolute, tile.element, out=absolute))
            delta.mul_(mask)
        tile.workspace.release(mark)


def top_k(inputs: Inputs, density: Sequence[float]) -> Sparsifier:
    """Keep the largest elements of each task vector: the given fraction, but at least one."""
    size = inputs.rows * inputs.columns
    return MagnitudeBand(
        inputs, [_all_or_none(density[i], size) or (0, max(1, int(density[i] * size))) for i in inputs.others]
    )


def drop_outliers(inputs: Inputs, density: Sequence[float], gamma: Sequence[float]) -> Sparsifier:
    """Drop the fraction gamma of the largest elements, and keep the fraction density of those that follow.

    If fewer elements than that would follow, fewer of the largest are dropped.
    """
    size = inputs.rows * inputs.columns
    ranks = []
    for i in inputs.others:
        kept = int(density[i] * size)
        dropped = min(int(gamma[i] * size), size - kept)
        ranks.append(_all_or_none(density[i], size) or (dropped, dropped + kept))
    return MagnitudeBand(inputs, ranks)


class Bernoulli(Sparsifier):
    """Keeps each element independently with the same probability.

    Args:
        inputs: inputs of the output tensor.
        density: probability of each input.
        unbiased: whether kept elements are divided by the probability.
    """

    workspace_per_element = 1.75
    random = True

    def __init__(self, inputs: Inputs, density: Sequence[float], *, unbiased: bool) -> None:
        super().__init__(inputs)
        self.thresholds = [None if density[i] >= 1 else threshold(density[i]) for i in inputs.others]
        self.drops = any(bound is not None for bound in self.thresholds)
        self.unbiased = unbiased

    def apply(self, delta: Tensor, index: int, tile: Tile, state: Any) -> None:
        mark = tile.workspace.mark()
        mask_ops.apply_mask(delta.view(-1), self._masks(index, tile), scratch(tile.elements, tile.workspace))
        tile.workspace.release(mark)

    def vectors(self, tile: Tile, buffers: Sequence[Tensor], state: Any) -> Iterator[Tensor]:
        if len(set(map(id, buffers))) < len(buffers):  # a shared buffer holds one vector at a time
            yield from super().vectors(tile, buffers, state)
            return
        mark = tile.workspace.mark()
        base = tile.load(base_of(self.inputs))
        mask_ops.masked_deltas(base, list(buffers), *self._inputs_and_masks(tile))
        tile.workspace.release(mark)
        yield from buffers

    def add_l1_sums(self, tile: Tile, sums: BlockSums, state: Any) -> None:
        mark = tile.workspace.mark()
        base = tile.load(base_of(self.inputs))
        mask_ops.masked_l1_sums(tile.empty(), base, *self._inputs_and_masks(tile), sums.buffers)
        tile.workspace.release(mark)

    def _inputs_and_masks(self, tile: Tile) -> tuple[list[Tensor], list[list[mask_ops.Mask]], mask_ops.Scratch]:
        """The inputs other than the base, their masks, and scratch buffers."""
        others = self.inputs.others
        all_masks = [self._masks(index, tile) for index in range(len(others))]
        return [tile.inputs[i] for i in others], all_masks, scratch(tile.elements, tile.workspace)

    def _masks(self, index: int, tile: Tile) -> list[mask_ops.Mask]:
        bound = self.thresholds[index]
        if bound is None:
            return []
        factor = 1 / (probability(bound) or 1.0) if self.unbiased else 1.0
        position = tile.positions[self.inputs.others[index]]
        return masks(tile.key, position, tile.element, tile.elements, bound, factor, tile.inputs[0].device)


class MagPrune(Sparsifier):
    """Keeps each element with a probability that rises with the rank of its magnitude in its row.

    The probability rises linearly from density - epsilon for the smallest element to density + epsilon for the largest.
    Among equal elements, later ones rank higher. The element of a one-column row is kept with probability density.

    Args:
        inputs: inputs of the output tensor.
        density: density of each input.
        epsilon: epsilon of each input.
        unbiased: whether kept elements are divided by their probability.

    Raises:
        MethodError: a probability is not between 0 and 1.
    """

    unit = Unit.ROW
    workspace_per_element = 6.0
    random = True

    def __init__(self, inputs: Inputs, density: Sequence[float], epsilon: Sequence[float], *, unbiased: bool) -> None:
        super().__init__(inputs)
        for i in inputs.others:
            _check_probabilities(density[i], epsilon[i], i)
        self.ranges = [(density[i], epsilon[i]) for i in inputs.others]
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        self.drops = any(mean < 1 for mean, _ in self.ranges)
        self.unbiased = unbiased

    def apply(self, delta: Tensor, index: int, tile: Tile, state: Any) -> None:
        mean, _ = self.ranges[index]
        if mean >= 1:
            return
        if mean <= 0:
            delta.mul_(0)
            return
        mark = tile.workspace.mark()
        bounds, shares = self._table(index)
        order = _ascending(delta, tile)
        numbers, scratch = (tile.workspace.take(tile.elements, torch.int32) for _ in range(2))
        hashes(tile.key, tile.positions[self.inputs.others[index]], tile.element, numbers, scratch)
        scratch.view(delta.shape).scatter_(1, order, bounds.to(delta.device).expand_as(delta))
        mask = torch.lt(numbers, scratch, out=numbers)
        delta.view(-1).mul_(scratch.view(torch.float32).copy_(mask))
        if self.unbiased:
            delta.mul_(tile.empty().scatter_(1, order, shares.to(delta.device, delta.dtype).expand_as(delta)))
        tile.workspace.release(mark)

    def _table(self, index: int) -> tuple[Tensor, Tensor]:
        """The bound of the hash and the reciprocal of the probability for each rank."""
        if index not in self._tables:
            mean, half = self.ranges[index]
            last = self.inputs.columns - 1
            bounds = [threshold(mean + (2 * half * rank / last - half if last else 0.0)) for rank in range(last + 1)]
            shares = [1 / probability(bound) for bound in bounds]
            self._tables[index] = torch.tensor(bounds, dtype=torch.int32), torch.tensor(shares, dtype=torch.float64)
        return self._tables[index]


def _check_probabilities(density: float, epsilon: float, index: int) -> None:
    """Raise MethodError if the probabilities of an input are not between 0 and 1."""
    if density in (0, 1) or 0 < density - epsilon <= density + epsilon < 1:
        return
    widest = min(density, 1 - density)
    raise MethodError(
        f"density - epsilon and density + epsilon must lie between 0 and 1, got density {density:g} and epsilon "
        f"{epsilon:g}: at this density epsilon must be below {widest:g}",
        parameters=["epsilon", "density"],
        index=index,
    )


def _ascending(delta: Tensor, tile: Tile) -> Tensor:
    """The column indices of each row in ascending order of magnitude, stable for ties; shape (rows, columns)."""
    columns = torch.arange(delta.shape[1], dtype=torch.int64, device=delta.device)
    keys = tile.empty(torch.int64).copy_(magnitudes(delta, tile).view(torch.int32))
    keys.bitwise_left_shift_(32).bitwise_or_(columns)  # keys are unique, so any sort is stable
    if on_cpu(keys):
        keys.numpy().sort(axis=1)  # several times faster than torch.sort
    else:
        keys.copy_(torch.sort(keys, dim=1).values)
    return keys.bitwise_and_((1 << 32) - 1)


def _all_or_none(density: float, size: int) -> tuple[int, int] | None:
    if density >= 1:
        return 0, size
    return (0, 0) if density <= 0 else None
