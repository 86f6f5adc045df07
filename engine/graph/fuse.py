"""Fuses several stages of a recipe into one kernel that recomputes intermediate tensors tile by tile.

Of an intermediate tensor, only the results of its reductions are kept. It is float32 (float64 if a source is), unless
its stage's ``out_dtype`` rounds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...io.safetensors.dtypes import DType
from ...methods.kernel.contract import Inputs, Kernel, Unit
from ...methods.kernel.tile import Tile

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class FusedPart:
    """The kernel of one stage in a fused kernel.

    Args:
        kernel: the stage's kernel.
        sources: for each input of the kernel, the index of a leaf, or ``~n`` for the result of part n.
        key: random key of the tensor that the kernel computes.
        positions: for each input, the index of its model in the stage.
        round_to: dtype that the result is rounded to; None to keep it in the work dtype.
    """

    kernel: Kernel
    sources: tuple[int, ...]
    key: int = 0
    positions: tuple[int, ...] = ()
    round_to: DType | None = None


class FusedKernel(Kernel):
    """The kernels of several stages; the output is the result of the last part.

    Args:
        inputs: the leaves, which are read from files.
        parts: the kernels in topological order.
    """

    def __init__(self, inputs: Inputs, parts: Sequence[FusedPart]) -> None:
        super().__init__(inputs)
        self.parts = tuple(parts)
        self._passes = [(number, index) for number, part in enumerate(parts) for index in range(part.kernel.reductions)]
        self.reductions = len(self._passes)
        self.workspace_per_element = self._buffers(len(parts) - 1)
        self.propagates_nonfinite = all(part.kernel.propagates_nonfinite for part in parts)
        by_row = any(part.kernel.unit is not Unit.ELEMENT for part in parts)
        self.unit = Unit.ROW if by_row else Unit.ELEMENT
        self.bound = parts[-1].kernel.bound

    def resized(self, shape: tuple[int, ...]) -> FusedKernel:
        """The same parts for tensors of another shape."""
        parts = [replace(part, kernel=part.kernel.resized(shape)) for part in self.parts]
        return FusedKernel(replace(self.inputs, shape=shape), parts)

    @property
    def alignment(self) -> int:
        """The alignment of tiles that suits every part."""
        return math.lcm(*(part.kernel.alignment for part in self.parts))

    def _buffers(self, number: int) -> float:
        """Workspace for a part: its inputs from other parts, plus the maximum needed to compute one or the result."""
        part = self.parts[number]
        inner = [~source for source in dict.fromkeys(part.sources) if source < 0]
        return len(inner) + 0.01 + max([part.kernel.workspace_per_element, *(self._buffers(child) for child in inner)])

    def _tile(self, number: int, tile: Tile, states: Sequence[Any]) -> Tile:
        """The tile for a part, with the inputs from other parts computed."""
        part = self.parts[number]
        computed: dict[int, Tensor] = {}
        for source in part.sources:
            if source < 0 and source not in computed:
                computed[source] = self._compute(~source, tile, states)
        shape = (-1,) if part.kernel.unit is Unit.ELEMENT else (-1, part.kernel.inputs.columns)
        inputs = [(computed[source] if source < 0 else tile.inputs[source]).view(shape) for source in part.sources]
        return Tile(inputs, tile.workspace, element=tile.element, key=part.key, positions=part.positions)

    def _compute(self, number: int, tile: Tile, states: Sequence[Any]) -> Tensor:
        """Compute a part's result for a tile into a new buffer, and release all other workspace."""
        import torch

        part = self.parts[number]
        dtype = None if part.round_to is None else getattr(torch, part.round_to.torch_name or "")
        result = tile.empty(dtype)
        mark = tile.workspace.mark()
        result.view(-1).copy_(part.kernel.combine(self._tile(number, tile, states), states[number]).view(-1))
        tile.workspace.release(mark)
        return result

    def _states(self, state: Any) -> list[Any]:
        return [None] * len(self.parts) if state is None else list(state)

    def needed(self, index: int, state: Any) -> bool:
        """Whether the part of reduction `index` needs the reduction."""
        number, own = self._passes[index]
        return self.parts[number].kernel.needed(own, self._states(state)[number])

    def reduce(self, index: int, tile: Tile, state: Any) -> Any:
        """Run a part's reduction."""
        number, own = self._passes[index]
        states = self._states(state)
        return self.parts[number].kernel.reduce(own, self._tile(number, tile, states), states[number])

    def merge(self, index: int, merged: Any, partial: Any) -> Any:
        """Merge partial results as the reduction's part does."""
        number, own = self._passes[index]
        return self.parts[number].kernel.merge(own, merged, partial)

    def finish(self, index: int, merged: Any, state: Any) -> Any:
        """The states of all parts, with that of the reduction's part updated."""
        number, own = self._passes[index]
        states = self._states(state)
        states[number] = self.parts[number].kernel.finish(own, merged, states[number])
        return tuple(states)

    def combine(self, tile: Tile, state: Any) -> Tensor:
        """Compute the last part's result."""
        states = self._states(state)
        last = len(self.parts) - 1
        return self.parts[last].kernel.combine(self._tile(last, tile, states), states[last])
