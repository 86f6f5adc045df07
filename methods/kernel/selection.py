"""Exact selection of a tensor's k largest magnitudes in a few passes and bounded memory, with ties broken by position.

Magnitudes are compared as the int32 bits of their float32 values, which have the same order. A small sample gives an
initial bracket for the k-th largest value. Each pass then counts the elements above the bracket and computes a
histogram of those inside, which narrows the bracket by a factor of 2^14. Each pass also tests a guess: it counts the
elements equal to it in each block. Model weights have few distinct values, so many elements are equal and the guess is
usually right. In that case a single pass follows the sample. The result is exact for any sample; a bad sample costs
more passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .contract import BLOCK
from .lazy import numpy as np
from .lazy import on_cpu, torch

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    from .tile import Tile

Streams = Callable[["Tile"], Iterator["Tensor"]]
"""Yields the float32 magnitudes of each stream for a tile, flat, in the same buffer."""

_TOP = (1 << 31) - 1  # bits of the largest magnitude, which is a NaN
_RUN = 16  # adjacent elements that are sampled together: half a cache line
_RUNS = 1 << 12  # strata of the tensor, each with one sampled run
_GATHER_PARTS = 1 << 3  # a tile is gathered in parts if more than this fraction (1/8) of its elements is selected
_GUESSED_BINS, _CERTAIN_BINS = 1 << 12, 1 << 16


@dataclass(frozen=True, slots=True)
class Threshold:
    """Selects the largest elements of a stream: those above a value, and the first ones of those equal to it.

    Args:
        value: magnitude of the smallest selected element.
        block: block before which all elements equal to `value` are selected.
        ties: number of equal elements in this block that are selected as well.
    """

    value: float
    block: int = 0
    ties: int = 0

    def mask(self, magnitudes: Tensor, element: int, out: Tensor) -> Tensor:
        """Set `out` to 1 for selected elements of a tile, and to 0 for others and NaN.

        Args:
            magnitudes: magnitudes of the tile, flat float32.
            element: index of the first element, a multiple of `BLOCK`.
            out: mask, flat float32; can be `magnitudes`.
        """
        end = self._end_of_ties(magnitudes, element)
        torch.ge(magnitudes[:end], self.value, out=out[:end])
        torch.gt(magnitudes[end:], self.value, out=out[end:])
        return out

    def bounds(self, values: Tensor, element: int) -> tuple[int, list[float]]:
        """A bound for `ops.hard_band`: an index, and the minimum magnitudes of selected values before and after it.

        Args:
            values: values of the tile, flat float32.
            element: index of the first value, a multiple of `BLOCK`.
        """
        below = float(np.nextafter(np.float32(self.value), np.float32(0)))
        return self._end_of_ties(values, element), [below, self.value]

    def _end_of_ties(self, values: Tensor, element: int) -> int:
        """The index in a tile from which elements equal to `value` are not selected."""
        end = self.block * BLOCK - element
        if 0 <= end < values.numel() and self.ties:
            block = values[end : end + BLOCK].abs()
            end += int((block == self.value).nonzero()[self.ties - 1]) + 1
        return max(0, min(end, values.numel()))


ALL, NONE = Threshold(-1.0), Threshold(float("inf"))


@dataclass(frozen=True, slots=True)
class Target:
    """The state of the search for the k largest magnitudes of a stream.

    Args:
        stream: index of the stream.
        rank: k, starting at 1; None if k is a fraction of the nonzero magnitudes, which are not counted yet.
        share: fraction of the nonzero magnitudes.
        exact: whether to select exactly k elements; False to find only the k-th largest magnitude.
        low: lower end of the bracket, as bits.
        high: upper end of the bracket, as bits.
        above: number of elements above the bracket; None while the bracket is an estimate.
        guess: value in the bracket to test in the next pass, as bits.
        threshold: result, or None while the search continues.
    """

    stream: int
    rank: int | None
    share: float = 1.0
    exact: bool = True
    low: int = 0
    high: int = _TOP
    above: int | None = 0
    guess: int = 0
    threshold: Threshold | None = None

    @property
    def query_key(self) -> tuple[object, ...]:
        """Identifies what a pass counts for the target; targets with the same key share their counts."""
        return self.stream, self.low, self.high, self.guess, self.above is None, self.rank is None

    @property
    def shift(self) -> int:
        """The number of low bits that a bin of the histogram ignores."""
        bins = _GUESSED_BINS if self.above is None else _CERTAIN_BINS
        return max(0, (self.high - self.low).bit_length() - (bins.bit_length() - 1))


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts of a pass for one target.

    Args:
        positive: number of elements above 0, if the rank depends on it.
        above: number of elements above the bracket.
        inside: histogram of the elements in the bracket; None for a bracket of a single value.
        above_guess: number of elements above the guess.
        equal: number of elements equal to the guess in each block.
    """

    positive: int
    above: int
    inside: Tensor | None
    above_guess: int
    equal: list[int]

    def __add__(self, other: Counts) -> Counts:
        inside = None if self.inside is None or other.inside is None else self.inside + other.inside
        return Counts(
            self.positive + other.positive,
            self.above + other.above,
            inside,
            self.above_guess + other.above_guess,
            self.equal + other.equal,
        )


@dataclass(frozen=True, slots=True)
class SelectionState:
    """The state of a selection between two passes.

    Args:
        targets: state of each target.
        samples: bits of the sampled elements of each stream, in descending order.
    """

    targets: tuple[Target, ...]
    samples: tuple[numpy.ndarray[Any, Any], ...] = ()


class Selection:
    """Finds the largest elements in streams of magnitudes, as the reductions of a kernel.

    Args:
        elements: number of elements in the tensor.
        targets: targets of the search.
        streams: computes the magnitudes of a tile, one stream after the other.
        sampled: whether to start with a sample; False if magnitudes can't be computed for single elements.
    """

    def __init__(self, elements: int, targets: Sequence[Target], streams: Streams, *, sampled: bool = True) -> None:
        self.elements = elements
        self.start = SelectionState(tuple(targets))
        self.streams = streams
        self.sampled = sampled
        # two histograms; the sample and a pass for a wrong bracket; the blocks of the ties
        self.reductions = 2 + 2 * sampled + any(target.exact for target in targets)
        self.stratum = -(-elements // (_RUNS * _RUN)) * _RUN  # one run per stratum is sampled

    def needed(self, index: int, state: SelectionState) -> bool:
        return index == 0 or any(target.threshold is None for target in state.targets)

    def reduce(self, index: int, tile: Tile, state: SelectionState | None) -> list[Any]:
        state = state or self.start
        if self.sampled and index == 0:
            indices = self._sample_indices(tile)
            sample = tile.gather(torch.from_numpy(indices)) if len(indices) else None
            return [[bits(x).cpu().numpy().copy()] for x in self.streams(sample)] if sample else []
        counted_by_key: dict[tuple[object, ...], Counts] = {}
        for stream, magnitudes in enumerate(self.streams(tile)):
            for target in state.targets:
                if target.stream == stream and target.threshold is None and target.query_key not in counted_by_key:
                    counted_by_key[target.query_key] = count_target(target, bits(magnitudes), tile)
        return [None if target.threshold else counted_by_key[target.query_key] for target in state.targets]

    def merge(self, merged: list[Any] | None, partial: list[Any]) -> list[Any]:
        if not merged or not partial:
            return merged or partial
        return [a if b is None else b if a is None else a + b for a, b in zip(merged, partial, strict=True)]

    def finish(self, index: int, merged: list[Any] | None, state: SelectionState | None) -> SelectionState:
        state = state or self.start
        if not merged:
            return SelectionState(tuple(replace(target, threshold=NONE) for target in state.targets))
        if self.sampled and index == 0:
            samples = tuple(np.sort(np.concatenate(parts))[::-1] for parts in merged)
            targets = (initial_bracket(target, samples[target.stream], self.elements) for target in state.targets)
            return SelectionState(tuple(targets), samples)
        targets = (
            target if counts is None else narrow(target, counts, state.samples)
            for target, counts in zip(state.targets, merged, strict=True)
        )
        return replace(state, targets=tuple(targets))

    def _sample_indices(self, tile: Tile) -> numpy.ndarray[Any, Any]:
        """The indices in the tile of the sampled elements: one run at a pseudo-random position in each stratum."""
        strata = np.arange(tile.element // self.stratum, (tile.element + tile.elements - 1) // self.stratum + 1)
        runs = self.stratum // _RUN
        spread = (strata.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)).astype(np.int64)
        starts = strata * self.stratum + spread % runs * _RUN
        indices = (starts[:, None] + np.arange(_RUN)).reshape(-1) - tile.element
        return indices[(indices >= 0) & (indices < tile.elements)]


def bits(magnitudes: Tensor) -> Tensor:
    """View float32 magnitudes as integers, which have the same order."""
    return magnitudes.view(torch.int32)


def initial_bracket(target: Target, sample: numpy.ndarray[Any, Any], elements: int) -> Target:
    """Estimate a bracket that very likely contains the target from a sample in descending order."""
    size = len(sample)
    share = (target.rank - 0.5) / elements if target.rank else target.share * np.count_nonzero(sample) / size
    center = share * size
    margin = 8 + 2 * (size * share * (1 - share)) ** 0.5 if size < elements else 1
    first, middle, last = int(center - margin), min(int(center), size - 1), int(center + margin)
    return replace(
        target,
        low=int(sample[last]) if last < size else 0,
        high=int(sample[first]) if first >= 0 else _TOP,
        above=None,
        guess=int(sample[middle]),
    )


def count_target(target: Target, values: Tensor, tile: Tile) -> Counts:
    """The counts of one target in one tile."""
    mark = tile.workspace.mark()
    over, inside = (tile.workspace.take(values.numel(), torch.bool) for _ in range(2))
    positive = count_above(values, 0, inside) if target.rank is None else 0
    higher = count_above(values, target.high, over)
    number_inside = count_above(values, target.low - 1, inside) - higher
    torch.logical_xor(inside, over, out=inside)  # the elements in the bracket
    if target.low == target.high:
        counts = Counts(positive, higher, None, higher, count_per_block(inside))
    else:
        bins, blocks = (target.high - target.low >> target.shift) + 1, -(-values.numel() // BLOCK)
        histogram, above_guess, equal = torch.zeros(bins, dtype=torch.int64), higher, [0] * blocks
        for indices, selected in gather_flagged(values, inside, number_inside):
            histogram.add_(bin_counts(selected - target.low >> target.shift, bins))
            above_guess += int((selected > target.guess).sum())
            at_guess = bin_counts(indices[selected == target.guess] // BLOCK, blocks).tolist()
            equal = [a + b for a, b in zip(equal, at_guess, strict=True)]
        counts = Counts(positive, higher, histogram, above_guess, equal)
    tile.workspace.release(mark)
    return counts


def narrow(target: Target, counts: Counts, samples: Sequence[numpy.ndarray[Any, Any]]) -> Target:
    """Update a target with the counts of a pass."""
    rank = int(target.share * counts.positive) if target.rank is None else target.rank
    if rank == 0:
        return replace(target, rank=rank, threshold=NONE)
    target = replace(target, rank=rank)
    if counts.above_guess < rank <= counts.above_guess + sum(counts.equal):
        return replace(target, threshold=threshold_among_ties(target.guess, rank - counts.above_guess, counts.equal))
    above = counts.above if target.above is None else target.above
    if rank <= above:
        target = replace(target, low=target.high + 1, high=_TOP, above=0)
    elif counts.inside is None or rank > above + int(counts.inside.sum()):
        inside = sum(counts.equal) if counts.inside is None else int(counts.inside.sum())
        target = replace(target, low=0, high=target.low - 1, above=above + inside)
    else:
        bins = counts.inside.flip(0).cumsum(0)  # cumulative, from the highest bin down
        down = int(torch.searchsorted(bins, rank - above))
        index = len(bins) - 1 - down
        low = target.low + (index << target.shift)
        high = min(low + (1 << target.shift) - 1, target.high)
        ties = int(counts.inside[index])
        above += int(bins[down]) - ties
        target = replace(target, low=low, high=high, above=above)
        if low == high and (rank == above + ties or low == 0 or not target.exact):
            return replace(target, threshold=Threshold(_value(low), block=_TOP if low else 0))
    return replace(target, guess=_guess(target, samples))


def threshold_among_ties(threshold: int, ties: int, equal: Sequence[int]) -> Threshold:
    """The threshold that selects the first `ties` elements equal to it, given their number in each block."""
    block = 0
    while threshold and ties > equal[block]:
        ties -= equal[block]
        block += 1
    # which of the zeros are selected does not matter
    return Threshold(_value(threshold), block, ties) if threshold else Threshold(0.0)


def count_above(values: Tensor, bound: int, flags: Tensor) -> int:
    """Count the values above the bound, and set their flags."""
    if on_cpu(values):
        return int(np.count_nonzero(np.greater(values.numpy(), bound, out=flags.numpy())))
    return int(torch.gt(values, bound, out=flags).sum())


def count_per_block(flags: Tensor) -> list[int]:
    """Count the flags that are set in each block."""
    complete = flags.numel() // BLOCK * BLOCK
    rest = [int(torch.count_nonzero(flags[complete:]))] if complete < flags.numel() else []
    if not on_cpu(flags):
        return [*flags[:complete].view(-1, BLOCK).sum(1).tolist(), *rest]
    # adds eight flags at once as int64; each byte can hold a sum of 2^7 flags
    rows = math.gcd(BLOCK // 8, 1 << 7)
    sums = flags.numpy()[:complete].view(np.int64).reshape(-1, rows, BLOCK // 8 // rows).sum(1).view(np.uint8)
    return [*sums.sum(1).tolist(), *rest]


def gather_flagged(values: Tensor, flags: Tensor, number: int) -> Iterator[tuple[Any, Any]]:
    """The indices and the values of the `number` flagged elements: numpy arrays on the CPU, else tensors.

    Many elements are gathered in several parts to bound the memory.
    """
    size = values.numel()
    step = -(-size // _GATHER_PARTS) if number > size // _GATHER_PARTS else size
    for start in range(0, size, step):
        part = slice(start, start + step)
        if on_cpu(values):
            indices = flagged_indices(flags[part].numpy())
            yield indices + start, values[part].numpy().take(indices)
        else:
            flagged = flags[part].nonzero()[:, 0]
            yield flagged + start, values[part][flagged]


def flagged_indices(flags: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """The indices of the flags that are set, fast if they are few: eight flags are tested at once."""
    complete = len(flags) // 8 * 8
    words = flags[:complete].view(np.int64)
    eights = (words != 0).nonzero()[0]
    within = words.take(eights).view(np.bool_).nonzero()[0]
    indices: numpy.ndarray[Any, Any] = eights.take(within >> 3)
    indices <<= 3
    within &= 7
    indices += within
    if complete == len(flags):
        return indices
    return np.concatenate([indices, np.flatnonzero(flags[complete:]) + complete])


def bin_counts(numbers: Any, bins: int) -> Tensor:
    """Count each number below `bins`, as a CPU tensor."""
    if isinstance(numbers, torch.Tensor):
        return torch.bincount(numbers, minlength=bins).cpu()
    return torch.from_numpy(np.bincount(numbers, minlength=bins))


def _guess(target: Target, samples: Sequence[numpy.ndarray[Any, Any]]) -> int:
    """The median of the sampled values in the bracket, or the middle of the bracket."""
    if samples:
        ascending = samples[target.stream][::-1]
        first, last = np.searchsorted(ascending, target.low), np.searchsorted(ascending, target.high, side="right")
        if first < last:
            return int(ascending[(first + last) // 2])
    return target.low + (target.high - target.low) // 2


def _value(bits: int) -> float:
    """The float32 with the given bits."""
    return float(np.int32(bits).view(np.float32))
