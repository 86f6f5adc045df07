"""Where a tensor's bytes lie: the reference that the rest of mergeloom passes around instead of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from .dtypes import DType


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor in a file: nothing of it has been read.

    Args:
        file: the safetensors file.
        offset: of its first byte, counted from the start of the file, in bytes.
        nbytes: its size in bytes.
        dtype: its element type.
        shape: its shape; () for a 0-d tensor.
    """

    file: Path
    offset: int
    nbytes: int
    dtype: DType
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many elements it has: 1 for a 0-d tensor, 0 where a dimension is 0."""
        return prod(self.shape)
