"""Runs the passes of a kernel over tiles with torch, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..expression import Node
from ..kernel import Kernel, State
from ..reductions import ColumnSum, Count, Selection, Sum
from ..selection import Search, sample_indices, start
from . import counting
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
        self.kernel = kernel
        self.active = () if index is None else kernel.active(index, state)
        self.step = 0 if index is None else kernel.step(index)
        self.state = state
        self.workspace = workspace
        self.partials: list[list[Any]] = [[] for _ in kernel.reduced]
        selections = [number for number in self.active if isinstance(kernel.reduced[number].value, Selection)]
        sampling = {n for n in selections if kernel.reduced[n].value.sampled and self.step == 0}
        self.sampling = tuple(sorted(sampling))
        self.counting = tuple(number for number in self.active if number not in sampling)
        self._constants: dict[tuple[Any, ...], Tensor] = {}

    def combine(self, tile: Tile) -> Tensor:
        """The output elements of a tile in the work dtype, in a buffer of the workspace."""
        return self._run(None, tile).result()

    def reduce(self, tile: Tile) -> None:
        """Add a tile to the partial results."""
        if self.counting:
            self._run(self.counting, tile)
        for number in self.sampling:
            self._sample(number, tile)

    def result(self) -> list[Any]:
        """The partial result of each reduction for all tiles of the pass; None for those that it does not continue.

        This is where a pass waits for the device.
        """
        return [
            self._collected(number, node.value) if number in self.active else None
            for number, node in enumerate(self.kernel.reduced)
        ]

    # --- programs ----------------------------------------------------------------------------------------------------

    def _run(self, active: tuple[int, ...] | None, tile: Tile) -> ProgramRun:
        run = ProgramRun(self, active, tile)
        for instruction in run.program.instructions:
            run.perform(instruction)
        for number, sums in run.block_sums():
            self.partials[number].append(sums)
        return run

    def _sample(self, number: int, tile: Tile) -> None:
        """Take the sampled elements of a selection."""
        self.workspace.reset()
        indices = sample_indices(self.kernel.reduced[number].value.size, tile.element, tile.elements)
        if len(indices):
            self._run((number,), tile.gather(torch.from_numpy(indices)))

    def _collected(self, number: int, reduction: Any) -> Any:
        parts = self.partials[number]
        if isinstance(reduction, Sum):
            return torch.cat(parts).tolist()
        if isinstance(reduction, Count):
            return int(torch.stack(parts).sum())
        if isinstance(reduction, ColumnSum):
            return [part.cpu().numpy() for part in parts]
        if number in self.sampling:
            return [[part.cpu().numpy() for part in parts]]
        searches = self.searches(number, reduction)
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

    def searches(self, number: int, reduction: Selection) -> Sequence[Search]:
        state = None if self.state is None else self.state.reductions[number]
        return (state or start(reduction.targets)).searches

    def scalar(self, node: Node) -> Any:
        """The value of a scalar or column that earlier passes have computed."""
        assert self.state is not None
        return self.state.scalars[id(node)]

    def constant(self, node: Node, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A constant or scalar as a 0-d tensor, or columns as a row vector; all but constants are rounded to float32.

        They are cached by node, because the id of a list of columns can be that of an earlier one.
        """
        key = id(node), dtype, device
        if key not in self._constants:
            value = node.value if node.constant else self.scalar(node)
            exact = torch.bool if dtype is torch.bool else torch.float64
            if isinstance(value, list):
                made = torch.tensor(value, dtype=exact).to(device)
            else:
                made = torch.full((), value, dtype=exact, device=device)  # does not wait for the device
            if not node.constant and exact is torch.float64:
                made = made.to(torch.float32)
            self._constants[key] = made.to(dtype)
        return self._constants[key]
