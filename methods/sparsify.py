"""The ways to make a task vector sparse: by size, within sizes, at random, at random by rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .kernel.contract import Inputs, MethodError, Unit, base_of
from .kernel.hashing import hashes, masks, probability, scratch, threshold
from .kernel.lazy import on_cpu, torch
from .kernel.lazy_ops import mask_ops, ops
from .kernel.selection import ALL, NONE, Progress, Selection, Target, Threshold
from .task_vectors import Sparsifier, deltas, in_float32, magnitudes

if TYPE_CHECKING:
    from torch import Tensor

    from .kernel.block_sums import BlockSums
    from .kernel.tile import Tile


class MagnitudeBand(Sparsifier):
    """Keeps the elements from one rank of size to another, and zeros the others.

    Args:
        inputs: of the tensor.
        ranks: for each task vector, how many of the largest are dropped, and how many are left, these included, when
            the smallest are dropped.
    """

    buffers = 2.0

    def __init__(self, inputs: Inputs, ranks: Sequence[tuple[int, int]]) -> None:
        super().__init__(inputs)
        size = inputs.rows * inputs.columns
        self.ranks = list(ranks)
        self.drops = any(pair != (0, size) for pair in self.ranks)
        bounds = {(place, rank) for place, pair in enumerate(self.ranks) for rank in pair if 0 < rank < size}
        self.targets = {bound: number for number, bound in enumerate(sorted(bounds))}
        self.places = sorted({place for place, _ in bounds})
        targets = [Target(self.places.index(place), rank) for place, rank in self.targets]
        self.selection = Selection(size, targets, self._streams)
        self.reductions = self.selection.reductions if targets else 0
        self.size = size

    def _streams(self, tile: Tile) -> Iterator[Tensor]:
        indices = [self.inputs.others[place] for place in self.places]
        for delta in deltas(self.inputs, tile, indices=indices, absolute=True):
            mark = tile.workspace.mark()
            yield in_float32(delta, tile)
            tile.workspace.release(mark)

    def needed(self, index: int, state: Progress | None) -> bool:
        return state is None or self.selection.needed(index, state)

    def reduce(self, index: int, tile: Tile, state: Progress | None) -> Any:
        return self.selection.reduce(index, tile, state)

    def merge(self, index: int, merged: Any, partial: Any) -> Any:
        return self.selection.merge(merged, partial)

    def finish(self, index: int, merged: Any, state: Progress | None) -> Progress:
        return self.selection.finish(index, merged, state)

    def _cut(self, place: int, rank: int, state: Progress | None) -> Threshold:
        if not 0 < rank < self.size:
            return NONE if rank <= 0 else ALL
        cut = state.targets[self.targets[place, rank]].cut if state else None
        assert cut is not None
        return cut

    def apply(self, delta: Tensor, place: int, tile: Tile, state: Progress | None) -> None:
        dropped, left = (self._cut(place, rank, state) for rank in self.ranks[place])
        if left is ALL and dropped is NONE:
            return
        if left is NONE:
            delta.mul_(0)
            return
        mark = tile.workspace.mark()
        if delta.dtype is torch.float32:
            flat = delta.view(-1)
            least = (0, []) if left is ALL else left.bounds(flat, tile.element)
            largest = (0, []) if dropped is NONE else dropped.bounds(flat, tile.element)
            ops.hard_band(flat, tile.workspace.take(tile.elements), *least, *largest)
        else:  # whose magnitudes are compared in float32
            sizes = magnitudes(delta, tile)
            mask = tile.empty(torch.float32)
            left.mask(sizes, tile.element, out=mask)
            if dropped is not NONE:
                mask.sub_(dropped.mask(sizes, tile.element, out=sizes))
            delta.mul_(mask)
        tile.workspace.release(mark)


def largest(inputs: Inputs, density: Sequence[float]) -> Sparsifier:
    """Keeps the given share of the elements of each task vector, the largest ones: at least one."""
    size = inputs.rows * inputs.columns
    return MagnitudeBand(
        inputs, [_all_or_none(density[i], size) or (0, max(1, _part(density[i], size))) for i in inputs.others]
    )


def drop_outliers(inputs: Inputs, density: Sequence[float], gamma: Sequence[float]) -> Sparsifier:
    """Drops the share gamma, the largest ones, and keeps the share density of those that follow: where there are too
    few of these, fewer are dropped."""
    size = inputs.rows * inputs.columns
    ranks = []
    for i in inputs.others:
        left = _part(density[i], size)
        dropped = min(_part(gamma[i], size), size - left)
        ranks.append(_all_or_none(density[i], size) or (dropped, dropped + left))
    return MagnitudeBand(inputs, ranks)


def _part(share: float, size: int) -> int:
    """The number of elements that is this share of `size`, rounded down."""
    return int(share * size)


class Bernoulli(Sparsifier):
    """Keeps each element with a given probability, independently of all others.

    Args:
        inputs: of the tensor.
        density: of each input, the probability.
        unbiased: whether what is kept is divided by the probability.
    """

    buffers = 1.75
    random = True

    def __init__(self, inputs: Inputs, density: Sequence[float], *, unbiased: bool) -> None:
        super().__init__(inputs)
        self.thresholds = [None if density[i] >= 1 else threshold(density[i]) for i in inputs.others]
        self.drops = any(bound is not None for bound in self.thresholds)
        self.unbiased = unbiased

    def apply(self, delta: Tensor, place: int, tile: Tile, state: Any) -> None:
        mark = tile.workspace.mark()
        mask_ops.apply_mask(delta.view(-1), self._masks(place, tile), scratch(tile.elements, tile.workspace))
        tile.workspace.release(mark)

    def vectors(self, tile: Tile, buffers: Sequence[Tensor], state: Any) -> Iterator[Tensor]:
        if len(set(map(id, buffers))) < len(buffers):  # one after the other, then
            yield from super().vectors(tile, buffers, state)
            return
        mark = tile.workspace.mark()
        base = tile.load(base_of(self.inputs))
        mask_ops.masked_deltas(base, list(buffers), *self._all(tile))
        tile.workspace.release(mark)
        yield from buffers

    def add_sizes(self, tile: Tile, sums: BlockSums, state: Any) -> None:
        mark = tile.workspace.mark()
        base = tile.load(base_of(self.inputs))
        mask_ops.thinned_sizes(tile.empty(), base, *self._all(tile), sums.places)
        tile.workspace.release(mark)

    def _all(self, tile: Tile) -> tuple[list[Tensor], list[list[mask_ops.Mask]], mask_ops.Scratch]:
        """All inputs but the base, their masks, and what these need."""
        others = self.inputs.others
        kept = [self._masks(place, tile) for place in range(len(others))]
        return [tile.inputs[i] for i in others], kept, scratch(tile.elements, tile.workspace)

    def _masks(self, place: int, tile: Tile) -> list[mask_ops.Mask]:
        bound = self.thresholds[place]
        if bound is None:
            return []
        factor = 1 / (probability(bound) or 1.0) if self.unbiased else 1.0
        position = tile.positions[self.inputs.others[place]]
        return masks(tile.key, position, tile.element, tile.elements, bound, factor, tile.inputs[0].device)


class MagPrune(Sparsifier):
    """Keeps each element with a probability that rises with the rank of its size in its row.

    It goes in even steps from density - epsilon, for the smallest, to density + epsilon; of equal elements the later
    ones rank higher. The only element of a row is kept with probability density.

    Args:
        inputs: of the tensor.
        density: of each input.
        epsilon: of each input.
        unbiased: whether what is kept is divided by its probability.

    Raises:
        MethodError: where a probability would not lie between 0 and 1.
    """

    unit = Unit.ROW
    buffers = 6.0
    random = True

    def __init__(self, inputs: Inputs, density: Sequence[float], epsilon: Sequence[float], *, unbiased: bool) -> None:
        super().__init__(inputs)
        for i in inputs.others:
            _check_probabilities(density[i], epsilon[i], i)
        self.ranges = [(density[i], epsilon[i]) for i in inputs.others]
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        self.drops = any(mean < 1 for mean, _ in self.ranges)
        self.unbiased = unbiased

    def apply(self, delta: Tensor, place: int, tile: Tile, state: Any) -> None:
        mean, _ = self.ranges[place]
        if mean >= 1:
            return
        if mean <= 0:
            delta.mul_(0)
            return
        mark = tile.workspace.mark()
        bounds, shares = self._table(place)
        order = _rising(delta, tile)
        numbers, scratch = (tile.workspace.take(tile.elements, torch.int32) for _ in range(2))
        hashes(tile.key, tile.positions[self.inputs.others[place]], tile.element, numbers, scratch)
        scratch.view(delta.shape).scatter_(1, order, bounds.to(delta.device).expand_as(delta))
        mask = torch.lt(numbers, scratch, out=numbers)
        delta.view(-1).mul_(scratch.view(torch.float32).copy_(mask))
        if self.unbiased:
            delta.mul_(tile.empty().scatter_(1, order, shares.to(delta.device, delta.dtype).expand_as(delta)))
        tile.workspace.release(mark)

    def _table(self, place: int) -> tuple[Tensor, Tensor]:
        """For each rank, what the hash must lie below, and the reciprocal of the probability of that."""
        if place not in self._tables:
            mean, half = self.ranges[place]
            last = self.inputs.columns - 1
            bounds = [threshold(mean + (2 * half * rank / last - half if last else 0.0)) for rank in range(last + 1)]
            shares = [1 / probability(bound) for bound in bounds]
            self._tables[place] = torch.tensor(bounds, dtype=torch.int32), torch.tensor(shares, dtype=torch.float64)
        return self._tables[place]


def _check_probabilities(density: float, epsilon: float, index: int) -> None:
    """Raise MethodError where the probabilities of an input's elements would leave the interval from 0 to 1."""
    if density in (0, 1) or 0 < density - epsilon <= density + epsilon < 1:
        return
    widest = min(density, 1 - density)
    raise MethodError(
        f"density - epsilon and density + epsilon must lie between 0 and 1, got density {density:g} and epsilon "
        f"{epsilon:g}: at this density epsilon must be below {widest:g}",
        parameters=["epsilon", "density"],
        index=index,
    )


def _rising(delta: Tensor, tile: Tile) -> Tensor:
    """The columns of each row's elements in rising order of size, equal ones in their order; shape (rows, columns)."""
    columns = torch.arange(delta.shape[1], dtype=torch.int64, device=delta.device)
    keys = tile.empty(torch.int64).copy_(magnitudes(delta, tile).view(torch.int32))
    keys.bitwise_left_shift_(32).bitwise_or_(columns)  # no two are equal, so any sort is stable
    if on_cpu(keys):
        keys.numpy().sort(axis=1)  # in place, and several times faster than torch's
    else:
        keys.copy_(torch.sort(keys, dim=1).values)
    return keys.bitwise_and_((1 << 32) - 1)


def _all_or_none(density: float, size: int) -> tuple[int, int] | None:
    if density >= 1:
        return 0, size
    return (0, 0) if density <= 0 else None
