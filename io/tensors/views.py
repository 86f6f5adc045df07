"""Stored tensors whose elements are not in the order of their shape, such as transposed ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class View:
    """The arrangement of a tensor's elements in the range of bytes that is stored for it.

    Args:
        shape: the shape of the tensor; no dimension is 0.
        strides: for each dimension, the distance of two neighboring elements in the range, in elements. The first
            element of the tensor is the first of the range, and the last one the last.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
