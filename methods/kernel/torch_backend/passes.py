"""Runs the passes of a kernel over tiles with torch, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernel import Kernel, State
from ..reduction.reductions import ColumnSum, Count, Sum
from ..reduction.selection import Search, sample_indices
from . import counting
from .context import PassContext
from .program_run import ProgramRun
from .tile import Tile, Workspace


class Pass:
    """One pass of a kernel over the tiles of a chunk.

    Args:
        kernel: kernel.
        index: number of the pass; None for the pass that computes the output.
        state: state after the passes before it.
        workspace: workspace of the thread, with the work dtype of the chunk.
    """

    def __init__(self, kernel: Kernel, index: int | None, state: State | None, workspace: Workspace) -> None:
        self._reductions = [node.value for node in kernel.reduced]
        self._byproducts = range(len(kernel.reduced), len(kernel.reduce_nodes))
        self._active = () if index is None else kernel.active(index, state)
        first = index is not None and kernel.step(index) == 0
        self._sampling = tuple(n for n in self._active if first and getattr(self._reductions[n], "sampled", False))
        self._counting = tuple(number for number in self._active if number not in self._sampling)
        self._context = PassContext(kernel, state, workspace, self._sampling)

    def combine(self, tile: Tile) -> Tensor:
        """The elements of the first output of a tile in the work dtype, in a buffer of the workspace."""
        return self.combine_all(tile)[0]

    def combine_all(self, tile: Tile) -> list[Tensor]:
        """The elements of each output of a tile in the work dtype, mostly in buffers of the workspace."""
        return self._run(None, tile).results()

    def reduce(self, tile: Tile) -> None:
        """Add a tile to the partial results."""
        if self._counting:
            self._run(self._counting, tile)
        for number in self._sampling:
            self._sample(number, tile)

    def result(self) -> list[Any]:
        """The partial result of each reduction for all tiles of the pass; None for those that it does not continue.

        This is where a pass waits for the device.
        """
        return [
            self._collected(number, reduction) if number in self._active else None
            for number, reduction in enumerate(self._reductions)
        ]

    def byproducts(self) -> list[list[float]]:
        """The partial result of each by-product for all tiles that were combined. This waits for the device."""
        return [torch.cat(self._context.partials[number]).tolist() for number in self._byproducts]

    # --- programs ----------------------------------------------------------------------------------------------------

    def _run(self, active: tuple[int, ...] | None, tile: Tile) -> ProgramRun:
        run = ProgramRun(self._context, active, tile)
        for instruction in run.program.instructions:
            run.perform(instruction)
        for number, sums in run.block_sums():
            self._context.partials[number].append(sums)
        return run

    def _sample(self, number: int, tile: Tile) -> None:
        """Take the sampled elements of a selection."""
        tile.workspace.reset()
        indices = sample_indices(self._reductions[number].size, tile.element, tile.elements)
        if len(indices):
            self._run((number,), tile.gather(torch.from_numpy(indices), self._context.kernel.inputs))

    def _collected(self, number: int, reduction: Any) -> Any:
        parts = self._context.partials[number]
        if isinstance(reduction, Sum):
            return torch.cat(parts).tolist()
        if isinstance(reduction, Count):
            return int(torch.stack(parts).sum())
        if isinstance(reduction, ColumnSum):
            return [part.cpu().numpy() for part in parts]
        if number in self._sampling:
            return [[part.cpu().numpy() for part in parts]]
        searches = self._context.searches(number, reduction)
        return [self._counts(search, [part[n] for part in parts]) for n, search in enumerate(searches)]

    @staticmethod
    def _counts(search: Search, parts: list[Any]) -> Any:
        if parts[0] is None:
            return None
        if isinstance(parts[0], list):
            return counting.counts_of(search, parts)
        merged = parts[0]
        for part in parts[1:]:
            merged = merged + part
        return merged
