"""Views that torch makes are read through an access, or refused; the elements are those that torch sees."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mergeloom.engine.model.formats.strided import access_of
from mergeloom.io.tensors.views import View
from mergeloom.methods.kernel.access import Slice, TransposedSlice, matrices

STORAGE = torch.arange(4 * 6 * 5)
VIEWS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: STORAGE.reshape(20, 6).t(),
    "columns": lambda: STORAGE.reshape(20, 6)[:, 1:4],
    "every second row": lambda: STORAGE.reshape(20, 6)[::2],
    "rows from the middle of columns": lambda: STORAGE.reshape(20, 6)[3:9, 2:],
    "one column": lambda: STORAGE.reshape(20, 6)[:, 2],
    "one column as a matrix": lambda: STORAGE.reshape(20, 6)[:, 2:3],
    "every third element": lambda: STORAGE[::3],
    "transposed part": lambda: STORAGE.reshape(20, 6)[2:9, 1:4].t(),
    "interleaved rows": lambda: STORAGE.reshape(20, 6)[:, ::2].t(),
    "transposed matrices": lambda: STORAGE.reshape(4, 6, 5).transpose(1, 2),
    "matrices by turns": lambda: STORAGE.reshape(4, 6, 5).transpose(0, 1),
    "a convolution": lambda: STORAGE.reshape(5, 4, 3, 2)[:, :, :, :1],
    "with ones": lambda: STORAGE.reshape(20, 1, 6, 1).transpose(0, 2),
}
REFUSED: dict[str, Callable[[], Tensor]] = {
    "last dimension first": lambda: STORAGE.reshape(4, 6, 5).permute(2, 0, 1),
    "expanded": lambda: STORAGE[:1].expand(7),
    "expanded rows": lambda: STORAGE[:6].expand(5, 6),
    "every second column": lambda: STORAGE.reshape(20, 6)[:, ::2],
    "stacks of unequal distance": lambda: STORAGE.reshape(4, 6, 5)[:, :3].transpose(0, 1).reshape(3, 2, 2, 5),
    "overlapping rows": lambda: STORAGE.as_strided((5, 4), (2, 1)),
    "overlapping columns": lambda: STORAGE.as_strided((5, 4), (3, 2)),
}


def view_of(tensor: Tensor) -> View:
    return View(tuple(tensor.shape), tuple(tensor.stride()))


@pytest.mark.parametrize("name", VIEWS)
def test_the_elements_are_those_of_torch(name: str) -> None:
    tensor = VIEWS[name]()
    access = access_of(view_of(tensor))
    start = int(tensor.reshape(-1)[0])
    stack, rows, columns = matrices(tuple(tensor.shape))
    found = []
    for matrix, row, column in itertools.product(range(stack), range(rows), range(columns)):
        if isinstance(access, Slice):
            index = access.offset + matrix * access.matrix_stride + row * access.stride + column
        else:
            assert isinstance(access, TransposedSlice)
            index = access.offset + matrix * access.matrix_stride + column * access.stride + row * access.step
        found.append(int(STORAGE[start + index]))
    assert found == tensor.reshape(-1).tolist()
    assert access.part_shape_fits(tuple(tensor.shape), (int(tensor.max()) - start + 1,))


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_access_expresses_is_refused(name: str) -> None:
    tensor = REFUSED[name]()
    assert not tensor.is_contiguous()
    assert access_of(view_of(tensor)) is None


def test_no_access_reads_much_more_than_the_range() -> None:
    """Of each view that is read, the staged elements are at most those of the range that is stored for it."""
    for make in VIEWS.values():
        tensor = make()
        access = access_of(view_of(tensor))
        assert access is not None
        size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        spans = access.spans(tuple(tensor.shape), (size,), 0, tensor.numel())
        assert sum(span.length for span in spans) <= size
