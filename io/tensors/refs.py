"""References to stored tensors, which mergeloom passes around instead of the tensors themselves."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from .dtypes import DType


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor stored in a file; its data has not been read.

    Args:
        file: the safetensors file.
        offset: the position of the tensor's first byte in the file, in bytes.
        nbytes: the size of the data in bytes.
        dtype: the dtype.
        shape: the shape; () for a 0-d tensor.
    """

    file: Path
    offset: int
    nbytes: int
    dtype: DType
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """The number of elements: 1 for a 0-d tensor, 0 if a dimension is 0."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorClass:
    """What the stored tensors of one dtype and shape have in common.

    Args:
        dtype: the dtype.
        shape: the shape; () for a 0-d tensor.
        nbytes: the size of the data in bytes.
    """

    dtype: DType
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        """The number of elements: 1 for a 0-d tensor, 0 if a dimension is 0."""
        return prod(self.shape)
