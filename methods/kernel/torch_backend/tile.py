"""A tile, which is the same range of elements of every input, and the scratch memory of a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


_MAX_CACHED_BUFFERS = 256  # per workspace


class Workspace:
    """The scratch memory of one worker: a stack of buffers that is reset for each tile, so passes allocate no memory.

    Args:
        memory: one-dimensional uint8 tensor on the compute device, aligned to 64 bytes.
        dtype: work dtype: float64 if an input is float64, else float32.
    """

    def __init__(self, memory: Tensor, dtype: torch.dtype) -> None:
        self._memory = memory
        self._used = 0
        self._taken: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self.dtype = dtype
        self.peak = 0

    def reset(self) -> None:
        """Release all buffers."""
        self._used = 0

    def take(self, elements: int, dtype: torch.dtype | None = None) -> Tensor:
        """Take an uninitialized buffer of `elements` elements. Raises MemoryError beyond the declared workspace."""
        dtype = dtype or self.dtype
        nbytes = -(-elements * dtype.itemsize // 64) * 64
        if self._used + nbytes > self._memory.numel():
            total = self._memory.numel()
            raise MemoryError(f"a kernel needs more workspace than it declares: {self._used + nbytes} of {total} bytes")
        key = (self._used, elements, dtype)
        buffer = self._taken.get(key)  # cached, because a new view costs as much as a small operation
        if buffer is None:
            if len(self._taken) >= _MAX_CACHED_BUFFERS:
                self._taken.clear()
            buffer = self._memory[self._used : self._used + elements * dtype.itemsize].view(dtype)
            self._taken[key] = buffer
        self._used += nbytes
        self.peak = max(self.peak, self._used)
        return buffer

    def mark(self) -> int:
        """The current top of the stack, for `release`."""
        return self._used

    def release(self, mark: int) -> None:
        """Release all buffers taken since `mark`."""
        self._used = mark


class Tile:
    """The same range of elements of every input.

    Args:
        inputs: elements of each input in its stored dtype, shape (elements,) if the kernel's unit is the element,
            else (rows, columns).
        workspace: scratch memory, which also holds the results.
        element: index of the first element in the tensor, in row-major order.
        key: 64-bit random key of the output tensor; combined with an input's position it gives the input's key.
        positions: position of each input's model in the recipe, for random keys.
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
        """The number of elements."""
        return self.inputs[0].numel()

    def empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """Take an uninitialized workspace buffer of the tile's shape, by default in the work dtype."""
        first = self.inputs[0]
        buffer = self.workspace.take(first.numel(), dtype)
        return buffer if first.ndim == 1 else buffer.view(first.shape)

    def load(self, index: int, out: Tensor | None = None) -> Tensor:
        """Convert input `index` to the work dtype, which is exact, in `out` or in a new buffer."""
        buffer = self.empty() if out is None else out
        return buffer.copy_(self.inputs[index])

    def gather(self, indices: Tensor) -> Tile:
        """A flat tile of the elements at the given indices, with the same workspace."""
        indices = indices.to(self.inputs[0].device)
        inputs = [x.reshape(-1).index_select(0, indices) for x in self.inputs]
        return Tile(inputs, self.workspace, element=self.element, key=self.key, positions=self.positions)
