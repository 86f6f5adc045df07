"""Finds tensors whose elements are stored in another order than that of their shape, such as transposed ones."""

from __future__ import annotations

from collections.abc import Iterator

from ....errors import CheckpointError
from ....io.checkpoint.checkpoint import Checkpoint
from ....io.open_source import quoted
from ....io.tensors.dtypes import DType
from ....io.tensors.views import View
from ....methods.kernel.access import Access, Slice, TransposedSlice
from ..logical import LogicalTensor, Part


def access_of(view: View) -> Access | None:
    """Return the access to a view's elements in the range that is stored for it; None if no access expresses it.

    The last two dimensions are a matrix. Either its rows or its columns must be stored without gaps that belong to
    other rows or columns, and the matrices of a stack must have equal distances.
    """
    shape = (1, 1, *view.shape)
    strides = (0, 0, *view.strides)
    rows, columns = shape[-2:]
    row, column = strides[-2:]
    matrix = _stack_stride(shape[:-2], strides[:-2])
    if matrix is None:
        return None
    if column == 1 or columns == 1:
        stride = row if rows > 1 else columns
        return Slice(0, stride, matrix) if stride >= columns else None
    step = row if rows > 1 else 1
    if step < 1 or column <= (rows - 1) * step:  # the columns overlap, or every one of them needs most of the range
        return None
    return TransposedSlice(0, column, step, matrix)


def _stack_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """Return the distance of two neighboring matrices of a stack of any dimensions; None if it varies."""
    found = 0
    expected = None
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if expected is None:
            found = stride
        elif stride != expected:
            return None
        expected = stride * size
    return found


def find_views(checkpoint: Checkpoint) -> Iterator[LogicalTensor]:
    """Find the tensors whose elements are stored in another order.

    Raises:
        CheckpointError: one can't be read, with what to do.
    """
    for name, view in checkpoint.views.items():
        ref = checkpoint.tensors[name]
        access = _access(ref.file, name, ref.dtype, view)
        yield LogicalTensor(name, view.shape, ref.dtype, (Part(name, ref, access),))


def _access(file: object, name: str, dtype: DType, view: View) -> Access:
    """Return the access to a view's elements. Raises CheckpointError if it can't be read."""
    access = access_of(view)
    if access is None or not dtype.is_wide_float:
        kind = "" if access is None else f" {dtype.name}"
        raise CheckpointError(
            f"{file}: tensor {quoted(name)} with shape {list(view.shape)} has the strides {list(view.strides)}, and "
            f"mergeloom can't read{kind} tensors that are stored in this order: call .contiguous() on the tensor and "
            "save the model again"
        )
    return access
