"""The k-th largest of a tensor's magnitudes, exactly, in a few passes and bounded memory, ties broken by position.

Magnitudes are compared as the int32 bits of their float32 values, whose order is the same. A small sample tells where
the k-th largest must about be; then each pass counts, exactly, what lies above that bracket of values and, in
a histogram, what lies inside, which leaves a bracket 2^14 times narrower. Each pass also tries a guess: it counts the
elements equal to it in each block. The weights of models have few bits, so a value is shared by many elements, and the
guess is mostly right: then the first pass after the sample is the last. Whatever the sample says, the result is exact;
it decides only how soon it is found.
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
"""From a tile to the float32 magnitudes of each stream, flat, one after the other in the same buffer."""

_TOP = (1 << 31) - 1  # the bits of the largest magnitude, a NaN's
_RUN = 16  # neighbouring elements that are sampled together: half a cache line
_RUNS = 1 << 12
_FEW = 1 << 3  # a tile is gathered from whole where this part of it is wanted at the most, else by as many parts
_GUESSED_BINS, _CERTAIN_BINS = 1 << 12, 1 << 16


@dataclass(frozen=True, slots=True)
class Threshold:
    """The elements of highest rank in a stream: those above `threshold`, and of those equal to it the first ones.

    Args:
        threshold: a magnitude.
        block: equal elements are in if they lie in a block before this one.
        ties: how many of those in this block are in too.
    """

    threshold: float
    block: int = 0
    ties: int = 0

    def mask(self, magnitudes: Tensor, element: int, out: Tensor) -> Tensor:
        """1 where a tile's element is in, 0 where it isn't or is NaN; into `out`, which may be `magnitudes`.

        Args:
            magnitudes: flat, float32.
            element: the index of the first of them, a multiple of `BLOCK`.
            out: float32.
        """
        place = self._place(magnitudes, element)
        torch.ge(magnitudes[:place], self.threshold, out=out[:place])
        torch.gt(magnitudes[place:], self.threshold, out=out[place:])
        return out

    def bounds(self, values: Tensor, element: int) -> tuple[int, list[float]]:
        """For `scripts.between`: of so many of a tile's first values the sizes must be above the first number, of the
        others above the second.

        Args:
            values: flat, float32.
            element: the index of the first of them, a multiple of `BLOCK`.
        """
        below = float(np.nextafter(np.float32(self.threshold), np.float32(0)))
        return self._place(values, element), [below, self.threshold]

    def _place(self, values: Tensor, element: int) -> int:
        """From which of a tile's elements on those equal to the threshold are out."""
        place = self.block * BLOCK - element
        if 0 <= place < values.numel() and self.ties:
            block = values[place : place + BLOCK].abs()
            place += int((block == self.threshold).nonzero()[self.ties - 1]) + 1
        return max(0, min(place, values.numel()))


ALL, NONE = Threshold(-1.0), Threshold(float("inf"))


@dataclass(frozen=True, slots=True)
class Target:
    """What is known of the k-th largest of one stream.

    Args:
        stream: which one.
        rank: k, from 1 on; None where it is a share of the magnitudes above 0, which are still to be counted.
        share: that share.
        exact: whether the elements of rank k and above are sought, and not only the magnitude of rank k.
        low: the least bits that it can have.
        high: the largest bits that it can have.
        above: how many elements are larger than `high`; None where the bracket is only a guess.
        guess: bits in the bracket, to be tried.
        cut: the elements of rank k and above, once they are known.
    """

    stream: int
    rank: int | None
    share: float = 1.0
    exact: bool = True
    low: int = 0
    high: int = _TOP
    above: int | None = 0
    guess: int = 0
    cut: Threshold | None = None

    @property
    def query_key(self) -> tuple[object, ...]:
        """What a pass counts for it: the same for targets of the same question."""
        return self.stream, self.low, self.high, self.guess, self.above is None, self.rank is None

    @property
    def shift(self) -> int:
        """The bits that one bin of the bracket's histogram doesn't tell apart."""
        bins = _GUESSED_BINS if self.above is None else _CERTAIN_BINS
        return max(0, (self.high - self.low).bit_length() - (bins.bit_length() - 1))


@dataclass(frozen=True, slots=True)
class Counts:
    """What a pass counts for one target.

    Args:
        positive: elements above 0, where the rank depends on them.
        above: elements above the bracket.
        inside: the histogram of those in the bracket; None where that is a single value.
        above_guess: elements above the guess.
        equal: elements equal to the guess, in each block.
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
class Progress:
    """The state between two passes.

    Args:
        targets: what is known of each.
        samples: of each stream, the sorted bits of some elements.
    """

    targets: tuple[Target, ...]
    samples: tuple[numpy.ndarray[Any, Any], ...] = ()


class Selection:
    """Finds elements of given ranks in streams of magnitudes.

    Args:
        elements: of the tensor.
        targets: what is sought.
        streams: the magnitudes of a tile, as many streams as the targets name.
        sampled: whether a sample comes first; not where magnitudes are not to be had for single elements.
    """

    buffers = 1.25  # two flags, and what is gathered: 24 bytes for each of these

    def __init__(self, elements: int, targets: Sequence[Target], streams: Streams, *, sampled: bool = True) -> None:
        self.elements = elements
        self.start = Progress(tuple(targets))
        self.streams = streams
        self.sampled = sampled
        # two histograms tell all bits; and a sample, and a bracket that was guessed wrong; and the blocks of the ties
        self.reductions = 2 + 2 * sampled + any(target.exact for target in targets)
        self.stratum = -(-elements // (_RUNS * _RUN)) * _RUN  # of which one run is sampled

    def needed(self, index: int, state: Progress) -> bool:
        return index == 0 or any(target.cut is None for target in state.targets)

    def reduce(self, index: int, tile: Tile, state: Progress | None) -> list[Any]:
        state = state or self.start
        if self.sampled and index == 0:
            places = self._places(tile)
            sample = tile.gather(torch.from_numpy(places)) if len(places) else None
            return [[bits(x).cpu().numpy().copy()] for x in self.streams(sample)] if sample else []
        answers: dict[tuple[object, ...], Counts] = {}
        for stream, magnitudes in enumerate(self.streams(tile)):
            for target in state.targets:
                if target.stream == stream and target.cut is None and target.query_key not in answers:
                    answers[target.query_key] = count(target, bits(magnitudes), tile)
        return [None if target.cut else answers[target.query_key] for target in state.targets]

    def merge(self, merged: list[Any] | None, partial: list[Any]) -> list[Any]:
        if not merged or not partial:
            return merged or partial
        return [a if b is None else b if a is None else a + b for a, b in zip(merged, partial, strict=True)]

    def finish(self, index: int, merged: list[Any] | None, state: Progress | None) -> Progress:
        state = state or self.start
        if not merged:
            return Progress(tuple(replace(target, cut=NONE) for target in state.targets))
        if self.sampled and index == 0:
            samples = tuple(np.sort(np.concatenate(parts))[::-1] for parts in merged)
            targets = (initial_bracket(target, samples[target.stream], self.elements) for target in state.targets)
            return Progress(tuple(targets), samples)
        targets = (
            target if tally is None else narrow(target, tally, state.samples)
            for target, tally in zip(state.targets, merged, strict=True)
        )
        return replace(state, targets=tuple(targets))

    def _places(self, tile: Tile) -> numpy.ndarray[Any, Any]:
        """The places in the tile of the sampled elements: a run of neighbours somewhere in each stratum."""
        strata = np.arange(tile.element // self.stratum, (tile.element + tile.elements - 1) // self.stratum + 1)
        runs = self.stratum // _RUN
        spread = (strata.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)).astype(np.int64)
        starts = strata * self.stratum + spread % runs * _RUN
        places = (starts[:, None] + np.arange(_RUN)).reshape(-1) - tile.element
        return places[(places >= 0) & (places < tile.elements)]


def bits(magnitudes: Tensor) -> Tensor:
    """float32 magnitudes as integers of the same order."""
    return magnitudes.view(torch.int32)


def initial_bracket(target: Target, sample: numpy.ndarray[Any, Any], elements: int) -> Target:
    """A bracket that most likely holds the target, from a sample in falling order."""
    size = len(sample)
    share = (target.rank - 0.5) / elements if target.rank else target.share * np.count_nonzero(sample) / size
    place = share * size
    margin = 8 + 2 * (size * share * (1 - share)) ** 0.5 if size < elements else 1
    first, middle, last = int(place - margin), min(int(place), size - 1), int(place + margin)
    return replace(
        target,
        low=int(sample[last]) if last < size else 0,
        high=int(sample[first]) if first >= 0 else _TOP,
        above=None,
        guess=int(sample[middle]),
    )


def count(target: Target, values: Tensor, tile: Tile) -> Counts:
    """One pass's counts in one tile, for one target."""
    mark = tile.workspace.mark()
    beyond, inside = (tile.workspace.take(values.numel(), torch.bool) for _ in range(2))
    positive = above(values, 0, inside) if target.rank is None else 0
    higher = above(values, target.high, beyond)
    found_inside = above(values, target.low - 1, inside) - higher
    torch.logical_xor(inside, beyond, out=inside)  # those in the bracket
    if target.low == target.high:
        tally = Counts(positive, higher, None, higher, in_each_block(inside))
    else:
        bins, blocks = (target.high - target.low >> target.shift) + 1, -(-values.numel() // BLOCK)
        histogram, above_guess, equal = torch.zeros(bins, dtype=torch.int64), higher, [0] * blocks
        for places, found in gathered(values, inside, found_inside):
            histogram.add_(counted(found - target.low >> target.shift, bins))
            above_guess += int((found > target.guess).sum())
            at_guess = counted(places[found == target.guess] // BLOCK, blocks).tolist()
            equal = [a + b for a, b in zip(equal, at_guess, strict=True)]
        tally = Counts(positive, higher, histogram, above_guess, equal)
    tile.workspace.release(mark)
    return tally


def narrow(target: Target, tally: Counts, samples: Sequence[numpy.ndarray[Any, Any]]) -> Target:
    """What is known of a target after a pass."""
    rank = int(target.share * tally.positive) if target.rank is None else target.rank
    if rank == 0:
        return replace(target, rank=rank, cut=NONE)
    target = replace(target, rank=rank)
    if tally.above_guess < rank <= tally.above_guess + sum(tally.equal):
        return replace(target, cut=cut_ties(target.guess, rank - tally.above_guess, tally.equal))
    above = tally.above if target.above is None else target.above
    if rank <= above:
        target = replace(target, low=target.high + 1, high=_TOP, above=0)
    elif tally.inside is None or rank > above + int(tally.inside.sum()):
        inside = sum(tally.equal) if tally.inside is None else int(tally.inside.sum())
        target = replace(target, low=0, high=target.low - 1, above=above + inside)
    else:
        bins = tally.inside.flip(0).cumsum(0)  # elements in the highest bin, the highest two, ...
        down = int(torch.searchsorted(bins, rank - above))
        place = len(bins) - 1 - down
        low = target.low + (place << target.shift)
        high = min(low + (1 << target.shift) - 1, target.high)
        ties = int(tally.inside[place])
        above += int(bins[down]) - ties
        target = replace(target, low=low, high=high, above=above)
        if low == high and (rank == above + ties or low == 0 or not target.exact):
            return replace(target, cut=Threshold(_value(low), block=_TOP if low else 0))
    return replace(target, guess=_guess(target, samples))


def cut_ties(threshold: int, ties: int, equal: Sequence[int]) -> Threshold:
    """The cut after the first `ties` of the elements equal to the threshold, of which each block has so many."""
    block = 0
    while threshold and ties > equal[block]:
        ties -= equal[block]
        block += 1
    return (
        Threshold(_value(threshold), block, ties) if threshold else Threshold(0.0)
    )  # of zeros it doesn't matter which


def above(values: Tensor, bound: int, flags: Tensor) -> int:
    """How many are above the bound; `flags` says which."""
    if on_cpu(values):
        return int(np.count_nonzero(np.greater(values.numpy(), bound, out=flags.numpy())))
    return int(torch.gt(values, bound, out=flags).sum())


def in_each_block(flags: Tensor) -> list[int]:
    """How many of the flags are set, in each block."""
    whole = flags.numel() // BLOCK * BLOCK
    rest = [int(torch.count_nonzero(flags[whole:]))] if whole < flags.numel() else []
    if not on_cpu(flags):
        return [*flags[:whole].view(-1, BLOCK).sum(1).tolist(), *rest]
    # eight flags are added at once, in a byte each, which holds the sum of 2^7
    rows = math.gcd(BLOCK // 8, 1 << 7)
    sums = flags.numpy()[:whole].view(np.int64).reshape(-1, rows, BLOCK // 8 // rows).sum(1).view(np.uint8)
    return [*sums.sum(1).tolist(), *rest]


def gathered(values: Tensor, flags: Tensor, number: int) -> Iterator[tuple[Any, Any]]:
    """The places of the `number` values whose flag is set, and these: arrays of numpy on the CPU, else tensors. In
    parts where there are many, so that they take little memory."""
    size = values.numel()
    step = -(-size // _FEW) if number > size // _FEW else size
    for start in range(0, size, step):
        part = slice(start, start + step)
        if on_cpu(values):
            places = set_places(flags[part].numpy())
            yield places + start, values[part].numpy().take(places)
        else:
            found = flags[part].nonzero()[:, 0]
            yield found + start, values[part][found]


def set_places(flags: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """The places of the flags that are set, of which there are few: eight are looked at in one."""
    whole = len(flags) // 8 * 8
    words = flags[:whole].view(np.int64)
    eights = (words != 0).nonzero()[0]
    found = words.take(eights).view(np.bool_).nonzero()[0]
    places = eights.take(found >> 3)
    places <<= 3
    found &= 7
    places += found
    return places if whole == len(flags) else np.concatenate([places, np.flatnonzero(flags[whole:]) + whole])


def counted(numbers: Any, bins: int) -> Tensor:
    """How often each number below `bins` occurs; on the CPU."""
    if isinstance(numbers, torch.Tensor):
        return torch.bincount(numbers, minlength=bins).cpu()
    return torch.from_numpy(np.bincount(numbers, minlength=bins))


def _guess(target: Target, samples: Sequence[numpy.ndarray[Any, Any]]) -> int:
    """The middle one of the sampled values in the bracket, or of the bracket."""
    if samples:
        rising = samples[target.stream][::-1]
        first, last = np.searchsorted(rising, target.low), np.searchsorted(rising, target.high, side="right")
        if first < last:
            return int(rising[(first + last) // 2])
    return target.low + (target.high - target.low) // 2


def _value(bits: int) -> float:
    """The float32 with these bits."""
    return float(np.int32(bits).view(np.float32))
