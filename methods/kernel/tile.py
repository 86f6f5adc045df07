"""A tile: the same range of elements of every input, and the workspace that a kernel computes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


_REMEMBERED = 256  # buffers of a workspace


class Workspace:
    """Scratch memory of one worker: a stack of buffers that is emptied for each tile, so that no pass allocates.

    Args:
        memory: a one-dimensional uint8 tensor on the device that computes, aligned to 64 bytes.
        dtype: the work dtype: float32, or float64 where an input is.
    """

    def __init__(self, memory: Tensor, dtype: torch.dtype) -> None:
        self._memory = memory
        self._used = 0
        self._taken: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self.dtype = dtype
        self.peak = 0

    def reset(self) -> None:
        """Forget every buffer taken so far."""
        self._used = 0

    def take(self, elements: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised buffer of `elements` elements; MemoryError where the declared workspace is used up."""
        dtype = dtype or self.dtype
        nbytes = -(-elements * dtype.itemsize // 64) * 64
        if self._used + nbytes > self._memory.numel():
            total = self._memory.numel()
            raise MemoryError(
                f"a kernel asked for more workspace than it declares: {self._used + nbytes} of {total} bytes"
            )
        place = (self._used, elements, dtype)
        buffer = self._taken.get(place)  # tiles take the same buffers, and to carve one costs as much as a small op
        if buffer is None:
            if len(self._taken) >= _REMEMBERED:
                self._taken.clear()
            buffer = self._memory[self._used : self._used + elements * dtype.itemsize].view(dtype)
            self._taken[place] = buffer
        self._used += nbytes
        self.peak = max(self.peak, self._used)
        return buffer

    def mark(self) -> int:
        """Where the stack of buffers ends now; for `release`."""
        return self._used

    def release(self, mark: int) -> None:
        """Give back every buffer taken since `mark`."""
        self._used = mark


class Tile:
    """One range of elements of every input.

    Args:
        inputs: the elements, one tensor an input, in their stored dtypes: shape (elements,) where the kernel's unit
            is the element, else (rows, columns).
        workspace: where results go.
        element: the index of the first element in the tensor, in row-major order.
        key: the output tensor's random key, 64 bits; an input's own follows from it and the input's `positions` entry.
        positions: the place of each input's model in the recipe, for random keys.
    """

    __slots__ = ("element", "inputs", "key", "positions", "workspace")

    def __init__(
        self, inputs: Sequence[Tensor], workspace: Workspace, *, element: int, key: int, positions: Sequence[int]
    ) -> None:
        self.inputs = inputs
        self.workspace = workspace
        self.element = element
        self.key = key
        self.positions = positions

    @property
    def shape(self) -> torch.Size:
        """(elements,) or (rows, columns)."""
        return self.inputs[0].shape

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return self.inputs[0].numel()

    def empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised workspace buffer of the tile's shape, by default in the work dtype."""
        first = self.inputs[0]
        buffer = self.workspace.take(first.numel(), dtype)
        return buffer if first.ndim == 1 else buffer.view(first.shape)

    def load(self, index: int, out: Tensor | None = None) -> Tensor:
        """Input `index` in the work dtype, exactly; into `out` where given, else into a new buffer."""
        buffer = self.empty() if out is None else out
        return buffer.copy_(self.inputs[index])

    def gather(self, places: Tensor) -> Tile:
        """A flat tile of the elements at these places of this one, in the same workspace."""
        places = places.to(self.inputs[0].device)
        inputs = [x.reshape(-1).index_select(0, places) for x in self.inputs]
        return Tile(inputs, self.workspace, element=self.element, key=self.key, positions=self.positions)
