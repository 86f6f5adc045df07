"""Accesses: which elements of a stored part a range of a value's elements needs, and in which order they are staged.

A value is computed from parts, such as the codes and the scales of a quantized tensor. Value and part are seen as
matrices: the last dimension is a row, all others count rows, and the last two dimensions make one matrix of a
stack. An access translates a range of elements of the value into ranges of elements of the part. The bytes of these
ranges are staged one after another; kernels find an element of the part by its place there.

The functions are pure. `engine.graph.extents` adds widths and file offsets.
"""

from .base import ALIGNED, Access, Aligned, Shape, Span, matrices, row_range
from .elements import BlockRows, GatheredRows, Nibbles, Slice, TransposedSlice
from .factors import ColumnFactor, FactorAccess, RowFactor, SameRows, Strides, Whole

__all__ = [
    "ALIGNED",
    "Access",
    "Aligned",
    "BlockRows",
    "ColumnFactor",
    "FactorAccess",
    "GatheredRows",
    "Nibbles",
    "RowFactor",
    "SameRows",
    "Shape",
    "Slice",
    "Span",
    "Strides",
    "TransposedSlice",
    "Whole",
    "matrices",
    "row_range",
]
