"""What all tiles of a pass share: the state, the constants, the partial results."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ..expression import Node
from ..kernel import Kernel, State
from ..reduction.reductions import Selection
from ..reduction.selection import Search, start
from .tile import Workspace


class PassContext:
    """The context of a pass over the tiles of a chunk.

    Args:
        kernel: kernel.
        state: state after the passes before it.
        workspace: workspace of the thread, with the work dtype of the chunk.
        sampling: numbers of the selections that take their sample in this pass.

    Attributes:
        partials: partial results of each reduction, one or more per tile.
    """

    def __init__(self, kernel: Kernel, state: State | None, workspace: Workspace, sampling: Collection[int]) -> None:
        self.kernel = kernel
        self.workspace = workspace
        self.sampling = sampling
        self.partials: list[list[Any]] = [[] for _ in kernel.reduce_nodes]
        self._state = state
        self._constants: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def searches(self, number: int, reduction: Selection) -> Sequence[Search]:
        """The searches of a selection as the passes before have left them."""
        state = None if self._state is None else self._state.reductions[number]
        return (state or start(reduction.targets)).searches

    def scalar(self, node: Node) -> Any:
        """The value of a scalar or column that earlier passes have computed."""
        assert self._state is not None
        return self._state.scalars[id(node)]

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
