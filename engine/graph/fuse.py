"""Several stages of a recipe as one kernel: intermediate tensors are made again, a tile at a time, where needed.

Nothing of an intermediate is stored but its reductions' results. It is float32 (float64 where a source is), unless
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
class BoundSlice:
    """One stage's share of a fused kernel.

    Args:
        kernel: what it computes.
        sources: for each of the kernel's inputs, a leaf's number, or ``~n`` for the result of part number n.
        key: the random key of the tensor that it makes.
        positions: the place in the stage of each input's model.
        round_to: the type that its result is rounded to; None where it stays in the work dtype.
    """

    kernel: Kernel
    sources: tuple[int, ...]
    key: int = 0
    positions: tuple[int, ...] = ()
    round_to: DType | None = None


class FusedKernel(Kernel):
    """The kernels of several stages, the last part's result being the output.

    Args:
        inputs: the leaves: tensors that are read from files.
        parts: in an order in which each comes after those that it needs.
    """

    def __init__(self, inputs: Inputs, parts: Sequence[BoundSlice]) -> None:
        super().__init__(inputs)
        self.parts = tuple(parts)
        self._passes = [(part, index) for part, found in enumerate(parts) for index in range(found.kernel.reductions)]
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
        """Where every part's tiles can begin."""
        return math.lcm(*(part.kernel.alignment for part in self.parts))

    def _buffers(self, number: int) -> float:
        """Workspace for a part: its inputs that are results of others, and the most that is needed beside them."""
        part = self.parts[number]
        inner = [~source for source in dict.fromkeys(part.sources) if source < 0]
        return len(inner) + 0.01 + max([part.kernel.workspace_per_element, *(self._buffers(child) for child in inner)])

    def _tile(self, number: int, tile: Tile, states: Sequence[Any]) -> Tile:
        """The tile that a part sees: its inputs made where they are results of other parts."""
        part = self.parts[number]
        made: dict[int, Tensor] = {}
        for source in part.sources:
            if source < 0 and source not in made:
                made[source] = self._make(~source, tile, states)
        shape = (-1,) if part.kernel.unit is Unit.ELEMENT else (-1, part.kernel.inputs.columns)
        inputs = [(made[source] if source < 0 else tile.inputs[source]).view(shape) for source in part.sources]
        return Tile(inputs, tile.workspace, element=tile.element, key=part.key, positions=part.positions)

    def _make(self, number: int, tile: Tile, states: Sequence[Any]) -> Tensor:
        """A part's result for a tile, in a buffer of its own; what else it took is given back."""
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
        """Whether the part that reduction `index` belongs to needs it."""
        number, own = self._passes[index]
        return self.parts[number].kernel.needed(own, self._states(state)[number])

    def reduce(self, index: int, tile: Tile, state: Any) -> Any:
        """A part's reduction."""
        number, own = self._passes[index]
        states = self._states(state)
        return self.parts[number].kernel.reduce(own, self._tile(number, tile, states), states[number])

    def merge(self, index: int, merged: Any, partial: Any) -> Any:
        """As the part that the reduction belongs to."""
        number, own = self._passes[index]
        return self.parts[number].kernel.merge(own, merged, partial)

    def finish(self, index: int, merged: Any, state: Any) -> Any:
        """The states of all parts, with that of this reduction's part brought up to date."""
        number, own = self._passes[index]
        states = self._states(state)
        states[number] = self.parts[number].kernel.finish(own, merged, states[number])
        return tuple(states)

    def combine(self, tile: Tile, state: Any) -> Tensor:
        """The last part's result."""
        states = self._states(state)
        last = len(self.parts) - 1
        return self.parts[last].kernel.combine(self._tile(last, tile, states), states[last])
