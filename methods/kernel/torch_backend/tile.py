"""A tile, which is the same range of elements of every input, and the scratch memory of a kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..kernel import Kernel
from ..spec import InputSpec, Unit

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
    """The same range of elements of every aligned input, and what is staged of the others.

    Args:
        inputs: elements of each input in its stored dtype. Aligned inputs have the tile's shape; others have the shape
            (elements,), and all elements that are staged for a range around the tile.
        workspace: scratch memory, which also holds the results.
        element: index of the first element in the tensor, in row-major order.
        key: 64-bit random key of the output tensor; combined with an input's position it gives the input's key.
        positions: position of each input's model in the recipe, for random keys.
        shape: (elements,) if the kernel's unit is the element, else (rows, columns); None for that of the first input.
        staged: for each input, the first element and the number of elements of the range that it is staged for; empty
            if all are aligned.
        indices: index of each element in the tensor, if they are not consecutive; then the shape is (elements,).
    """

    __slots__ = ("element", "indices", "inputs", "key", "positions", "shape", "staged", "workspace")

    def __init__(
        self,
        inputs: Sequence[Tensor],
        workspace: Workspace,
        *,
        element: int,
        key: int,
        positions: Sequence[int],
        shape: Sequence[int] | None = None,
        staged: Sequence[tuple[int, int]] = (),
        indices: Tensor | None = None,
    ) -> None:
        self.inputs = inputs
        self.workspace = workspace
        self.element = element
        self.key = key
        self.positions = positions
        self.shape = tuple(inputs[0].shape if shape is None else shape)
        self.staged = staged
        self.indices = indices

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def gather(self, indices: Tensor, spec: InputSpec) -> Tile:
        """A flat tile of some elements, with the same workspace.

        Args:
            indices: index in the tile of each element.
            spec: inputs of the kernel.
        """
        indices = indices.to(self.inputs[0].device)
        return Tile(
            [
                x.reshape(-1).index_select(0, indices) if spec.access(number).aligned else x
                for number, x in enumerate(self.inputs)
            ],
            self.workspace,
            element=self.element,
            key=self.key,
            positions=self.positions,
            shape=indices.shape,
            staged=self.staged,
            indices=indices + self.element,
        )


def tiles(
    kernel: Kernel,
    inputs: Sequence[Tensor],
    workspace: Workspace,
    length: int,
    *,
    element: int,
    elements: int,
    key: int,
    positions: Sequence[int],
    staged: Sequence[tuple[int, int]] = (),
) -> Iterator[tuple[slice, Tile]]:
    """Yield the tiles of a chunk in order, each with its range in the chunk; the workspace is empty at the start.

    Args:
        kernel: kernel.
        inputs: one-dimensional tensor of each input in its stored dtype: the chunk's elements of an aligned input, and
            what is staged of another one.
        workspace: scratch memory.
        length: number of elements of a tile, a multiple of the kernel's alignment.
        element: index of the chunk's first element in the tensor.
        elements: number of elements of the chunk.
        key: as for `Tile`.
        positions: as for `Tile`.
        staged: as for `Tile`; empty if all inputs are staged for the chunk.
    """
    spec = kernel.inputs
    staged = staged or [(element, elements)] * len(inputs)
    for start in range(0, elements, max(1, length)):
        part = slice(start, min(start + length, elements))
        count = part.stop - start
        workspace.reset()
        shape = (count,) if kernel.unit is Unit.ELEMENT else (count // spec.columns, spec.columns)
        parts = [x[part].view(shape) if spec.access(number).aligned else x for number, x in enumerate(inputs)]
        yield (
            part,
            Tile(
                parts,
                workspace,
                element=element + start,
                key=key,
                positions=positions,
                shape=shape,
                staged=staged,
            ),
        )
