"""Exact selection of a tensor's k largest magnitudes in a few passes and bounded memory, with ties broken by position.

Magnitudes are compared as the int32 bits of their float32 values, which have the same order. A small sample gives an
initial bracket for the k-th largest value. Each pass then counts the elements above the bracket and computes a
histogram of those inside, which narrows the bracket by a factor of 2^14. Each pass also tests a guess: it counts the
elements equal to it in each block. Model weights have few distinct values, so many elements are equal and the guess is
usually right. In that case a single pass follows the sample. The result is exact for any sample; a bad sample costs
more passes. `counting` computes what a pass counts; here is what follows from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .target import Target

Bits = np.ndarray[Any, Any]
"""Magnitudes as int32."""

TOP = (1 << 31) - 1  # bits of the largest magnitude, which is a NaN
RUN = 16  # adjacent elements that are sampled together: half a cache line
_RUNS = 1 << 12  # strata of the tensor, each with one sampled run
_GUESSED_BINS, _CERTAIN_BINS = 1 << 12, 1 << 16


@dataclass(frozen=True, slots=True)
class Threshold:
    """Selects the largest elements: those above a value, and the first ones of those equal to it.

    Args:
        value: magnitude of the smallest selected element.
        block: block before which all elements equal to `value` are selected.
        ties: number of equal elements in this block that are selected as well.
    """

    value: float
    block: int = 0
    ties: int = 0

    def __float__(self) -> float:
        """The k-th largest magnitude."""
        return self.value


NONE = Threshold(float("inf"))


@dataclass(frozen=True, slots=True)
class Search:
    """The state of the search for the k largest magnitudes.

    Args:
        rank: k, starting at 1; None if k is a fraction of the nonzero magnitudes, which are not counted yet.
        share: fraction of the nonzero magnitudes.
        exact: whether to select exactly k elements; False to find only the k-th largest magnitude.
        low: lower end of the bracket, as bits.
        high: upper end of the bracket, as bits.
        above: number of elements above the bracket; None while the bracket is an estimate.
        guess: value in the bracket to test in the next pass, as bits.
        threshold: result, or None while the search continues.
    """

    rank: int | None
    share: float = 1.0
    exact: bool = True
    low: int = 0
    high: int = TOP
    above: int | None = 0
    guess: int = 0
    threshold: Threshold | None = None

    @property
    def query_key(self) -> tuple[object, ...]:
        """Identifies what a pass counts for the search; searches with the same key share their counts."""
        return self.low, self.high, self.guess, self.above is None, self.rank is None

    @property
    def shift(self) -> int:
        """The number of low bits that a bin of the histogram ignores."""
        bins = _GUESSED_BINS if self.above is None else _CERTAIN_BINS
        return max(0, (self.high - self.low).bit_length() - (bins.bit_length() - 1))

    @property
    def bins(self) -> int:
        """The number of bins of the histogram; 0 for a bracket of a single value."""
        return 0 if self.low == self.high else (self.high - self.low >> self.shift) + 1


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts of a pass for one search.

    Args:
        positive: number of elements above 0, if the rank depends on it.
        above: number of elements above the bracket.
        inside: histogram of the elements in the bracket; None for a bracket of a single value.
        above_guess: number of elements above the guess.
        equal: number of elements equal to the guess in each block.
    """

    positive: int
    above: int
    inside: np.ndarray[Any, Any] | None
    above_guess: int
    equal: tuple[int, ...]

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
        searches: state of the search for each target.
        sample: bits of the sampled elements, in descending order.
    """

    searches: tuple[Search, ...]
    sample: Bits | None = None


def start(targets: Sequence[Target]) -> SelectionState:
    """The state before the first pass."""
    return SelectionState(tuple(Search(target.rank, target.share, target.exact) for target in targets))


def finish(
    targets: Sequence[Target], sampled: int | None, step: int, merged: list[Any] | None, state: SelectionState | None
) -> SelectionState:
    """The state after the pass of a step.

    Args:
        targets: what is searched for.
        sampled: number of elements in the tensor if the first step takes a sample; None without one.
        step: number of the step.
        merged: counts of each search that continues, or the bits of the sampled elements as the only item.
        state: state before the pass.
    """
    state = state or start(targets)
    if merged is None:
        return SelectionState(tuple(replace(search, threshold=NONE) for search in state.searches))
    if sampled is not None and step == 0:
        sample = np.sort(np.concatenate(merged[0]))[::-1]
        searches = tuple(initial_bracket(search, sample, sampled) for search in state.searches)
        return SelectionState(searches, sample)
    searches = tuple(
        search if counts is None else narrow(search, counts, state.sample)
        for search, counts in zip(state.searches, merged, strict=True)
    )
    return replace(state, searches=searches)


def sample_indices(size: int, element: int, elements: int) -> np.ndarray[Any, Any]:
    """The indices in a tile of the sampled elements: one run at a pseudo-random position in each stratum.

    Args:
        size: number of elements in the tensor.
        element: index of the tile's first element.
        elements: number of elements in the tile.
    """
    stratum = -(-size // (_RUNS * RUN)) * RUN
    strata = np.arange(element // stratum, (element + elements - 1) // stratum + 1)
    spread = (strata.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)).astype(np.int64)
    starts = strata * stratum + spread % (stratum // RUN) * RUN
    indices: np.ndarray[Any, Any] = (starts[:, None] + np.arange(RUN)).reshape(-1) - element
    return indices[(indices >= 0) & (indices < elements)]


def initial_bracket(search: Search, sample: Bits, elements: int) -> Search:
    """Estimate a bracket that very likely contains the target from a sample in descending order."""
    size = len(sample)
    share = (search.rank - 0.5) / elements if search.rank else search.share * np.count_nonzero(sample) / size
    center = share * size
    margin = 8 + 2 * (size * share * (1 - share)) ** 0.5 if size < elements else 1
    first, middle, last = int(center - margin), min(int(center), size - 1), int(center + margin)
    return replace(
        search,
        low=int(sample[last]) if last < size else 0,
        high=int(sample[first]) if first >= 0 else TOP,
        above=None,
        guess=int(sample[middle]),
    )


def narrow(search: Search, counts: Counts, sample: Bits | None) -> Search:
    """Update a search with the counts of a pass."""
    rank = int(search.share * counts.positive) if search.rank is None else search.rank
    if rank == 0:
        return replace(search, rank=rank, threshold=NONE)
    search = replace(search, rank=rank)
    if counts.above_guess < rank <= counts.above_guess + sum(counts.equal):
        return replace(search, threshold=threshold_among_ties(search.guess, rank - counts.above_guess, counts.equal))
    above = counts.above if search.above is None else search.above
    if rank <= above:
        search = replace(search, low=search.high + 1, high=TOP, above=0)
    elif counts.inside is None or rank > above + int(counts.inside.sum()):
        inside = sum(counts.equal) if counts.inside is None else int(counts.inside.sum())
        search = replace(search, low=0, high=search.low - 1, above=above + inside)
    else:
        bins = np.cumsum(counts.inside[::-1])  # from the highest bin down
        down = int(np.searchsorted(bins, rank - above))
        index = len(bins) - 1 - down
        low = search.low + (index << search.shift)
        high = min(low + (1 << search.shift) - 1, search.high)
        ties = int(counts.inside[index])
        above += int(bins[down]) - ties
        search = replace(search, low=low, high=high, above=above)
        if low == high and (rank == above + ties or not search.exact):
            return replace(search, threshold=Threshold(_value(low), block=TOP))
    return replace(search, guess=_guess(search, sample))


def threshold_among_ties(threshold: int, ties: int, equal: Sequence[int]) -> Threshold:
    """The threshold that selects the first `ties` elements equal to it, given their number in each block."""
    block = 0
    while ties > equal[block]:
        ties -= equal[block]
        block += 1
    return Threshold(_value(threshold), block, ties)


def _guess(search: Search, sample: Bits | None) -> int:
    """The median of the sampled values in the bracket, or the middle of the bracket."""
    if sample is not None:
        ascending = sample[::-1]
        first, last = np.searchsorted(ascending, search.low), np.searchsorted(ascending, search.high, side="right")
        if first < last:
            return int(ascending[(first + last) // 2])
    return search.low + (search.high - search.low) // 2


def _value(bits: int) -> float:
    """The float32 with the given bits."""
    return float(np.int32(bits).view(np.float32))
