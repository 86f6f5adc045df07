"""Runs the passes of a kernel over chunks of bytes with compiled loops. Imports neither torch nor a GPU's libraries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..kernel import Kernel, State


class Chunk(NamedTuple):
    """The same range of elements of every input.

    Args:
        inputs: bytes of each input in its stored dtype.
        element: index of the first element in the tensor, a multiple of the kernel's alignment.
        elements: number of elements.
        key: 64-bit random key of the output tensor.
        positions: position in the recipe of each input's model.
    """

    inputs: Sequence[memoryview]
    element: int
    elements: int
    key: int
    positions: Sequence[int]


class Compiled:
    """The compiled loops of a kernel for certain dtypes. Equal expressions share them; any thread may use them.

    Args:
        kernel: kernel.
        dtypes: dtype of each input by its name in a safetensors header.
        out: dtype of the output by its name in a safetensors header.
    """

    def __init__(self, kernel: Kernel, dtypes: Sequence[str], out: str) -> None:
        raise NotImplementedError

    @property
    def scratch(self) -> int:
        """The size in bytes of the scratch memory that a thread needs for a chunk of any size."""
        raise NotImplementedError

    @property
    def allocated(self) -> int:
        """The bytes that a thread allocates besides, at most: numpy's temporaries and the results of a pass."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Compile the loops, or load them from the cache directory. Done by the first use if it was not called."""
        raise NotImplementedError


class FusedPass:
    """One pass of a kernel over the chunks that a thread computes.

    Args:
        compiled: compiled loops of the kernel.
        index: number of the pass; None for the pass that computes the output.
        state: state after the passes before it.
        scratch: scratch memory of the thread, at least `compiled.scratch` bytes, aligned to 64 bytes.
    """

    def __init__(self, compiled: Compiled, index: int | None, state: State | None, scratch: memoryview) -> None:
        raise NotImplementedError

    def reduce(self, chunk: Chunk) -> list[Any]:
        """The partial result of each reduction for a chunk; None for those that the pass does not continue."""
        raise NotImplementedError

    def combine(self, chunk: Chunk, out: memoryview) -> bool:
        """Write the output elements of a chunk to `out`, rounded once; NaNs are the canonical NaN of the dtype.

        Returns:
            Whether a value was NaN or beyond the largest number of the dtype.
        """
        raise NotImplementedError


def finite(data: memoryview, dtype: str) -> bool:
    """Whether no element is NaN or infinite; reads at the speed of the memory."""
    raise NotImplementedError


def count_nonfinite(data: memoryview, dtype: str) -> int:
    """The number of elements that are NaN or infinite."""
    raise NotImplementedError
