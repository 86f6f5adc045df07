"""Reductions: the statistics of a tensor that a method uses as scalars, computed in passes over its tiles.

A backend computes a partial result for each tile. Here they are merged, in element order, and turned into the result,
which does not depend on the tiles. This module does not import torch or numpy, because planning uses it.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..spec import BLOCK
from .target import Target

if TYPE_CHECKING:
    from .selection import SelectionState


class Reduction(ABC):
    """A reduction of one array over all tiles, in one or more passes, its steps.

    Attributes:
        steps: maximum number of passes.
        block: number of elements in a block, set when the method has been traced. Tiles start at a multiple of this
            number.
    """

    steps = 1
    block = 0

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for reductions that compute the same from the same array."""
        return type(self), self.block

    def bind(self, block: int) -> None:
        """Set the number of elements in a block, once."""
        self.block = self.block or block

    def moved(self, nodes: object) -> Reduction:
        """The same reduction for another graph, in which its operand can differ."""
        return copy.copy(self)

    def needed(self, step: int, state: Any) -> bool:
        """Whether the pass of a step can still change the state."""
        return step == 0

    def merge(self, merged: Any, partial: Any) -> Any:
        """Add the partial result of the tiles that follow those of `merged`."""
        return merged + partial

    @abstractmethod
    def finish(self, step: int, merged: Any, state: Any) -> Any:
        """The state after the pass of a step; `merged` is None for a tensor without elements."""

    def value(self, state: Any) -> Any:
        """The result: a number, or one number per column."""
        return state


class Sum(Reduction):
    """A sum. The partial result is a list with a float64 sum per block."""

    def finish(self, step: int, merged: list[float] | None, state: Any) -> float:
        """The exact sum of the blocks' sums, rounded once."""
        return total(merged or [])


class StripSum(Sum):
    """A sum whose blocks are complete rows, for kernels that work by rows of blocks.

    Each row is divided into strips of 2^11 elements from its first one on, and the strips of a block are added in
    order: a loop over a strip adds to the same totals for any number of columns.
    """


class Count(Reduction):
    """The number of elements for which a flag is set. The partial result is a number."""

    def finish(self, step: int, merged: int | None, state: Any) -> float:
        """The number as a float."""
        return float(merged or 0)


class ColumnSum(Reduction):
    """A sum over the first dimension for each index of the others.

    The partial result is a list with one array of `width` sums per block of `height` slices.

    Args:
        shape: shape of the tensor.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.width = max(1, math.prod(shape[1:]))
        self.height = max(32, -(-shape[0] // 128))  # at most 128 blocks, which bounds the partial sums
        self.block = self.width * self.height

    def finish(self, step: int, merged: list[Any] | None, state: Any) -> list[float]:
        """The exact sum of each column's blocks, rounded once."""
        if not merged:
            return [0.0] * self.width
        return [total(column) for column in zip(*(block.tolist() for block in merged), strict=True)]


class Selection(Reduction):
    """The search for the k-th largest magnitudes of an array; see `selection`.

    Args:
        size: number of elements in the tensor.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.targets: list[Target] = []
        self.sampled = True

    @property
    def key(self) -> tuple[Any, ...]:
        return (type(self), id(self)) if self.block else (type(self),)

    def add(self, target: Target) -> int:
        """Add a target, or find an equal one; returns its number."""
        if target not in self.targets:
            self.targets.append(target)
        return self.targets.index(target)

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Two histograms, the sample and a pass for a wrong bracket, and the blocks of the ties."""
        return 2 + 2 * self.sampled + any(target.exact for target in self.targets)

    def needed(self, step: int, state: SelectionState | None) -> bool:
        return step == 0 or state is None or any(search.threshold is None for search in state.searches)

    def merge(self, merged: Any, partial: Any) -> Any:
        return [a if b is None else b if a is None else a + b for a, b in zip(merged, partial, strict=True)]

    def finish(self, step: int, merged: Any, state: SelectionState | None) -> SelectionState:
        from .selection import finish

        return finish(self.targets, self.size if self.sampled else None, step, merged, state)

    def value(self, state: SelectionState) -> Any:
        return [search.threshold for search in state.searches]


def total(sums: Iterable[float]) -> float:
    """The exact sum, rounded once; NaN if a summand is NaN or if infinities cancel."""
    try:
        return math.fsum(sums)
    except (OverflowError, ValueError):
        return math.nan


def block_in_rows(height: int, columns: int) -> int:
    """The number of elements in a block of a method that works by rows of blocks, at least `BLOCK`: complete rows whose
    number divides that of a row of blocks, or several rows of blocks."""
    if height * columns < BLOCK:
        return row_block(height * columns)
    return next(rows for rows in range(1, height + 1) if height % rows == 0 and rows * columns >= BLOCK) * columns


def row_block(columns: int) -> int:
    """The number of elements in a block of a method that works by row: complete rows, at least `BLOCK` elements."""
    return -(-BLOCK // columns) * columns if columns else BLOCK
