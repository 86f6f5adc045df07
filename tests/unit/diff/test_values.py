"""Stored elements are decoded to the values that torch gives them; 64-bit integers exactly, in two parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergeloom.engine.run.diff.values import can_decode, decode, decode_exactly, is_wide
from mergeloom.io.tensors.dtypes import DTYPES

NUMBERS = [name for name, dtype in DTYPES.items() if can_decode(dtype)]


def every_code(name: str) -> torch.Tensor:
    """A tensor with every 8-bit or 16-bit code, or random codes of a wider dtype."""
    dtype = DTYPES[name]
    if name == "BOOL":
        return torch.tensor([False, True])
    if dtype.bits > 16:
        codes = np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8)
    else:
        codes = np.arange(1 << dtype.bits, dtype=f"u{dtype.bits // 8}").view(np.uint8)
    return torch.from_numpy(codes).view(getattr(torch, dtype.torch_name or ""))


@pytest.mark.parametrize("name", NUMBERS)
def test_values_are_those_of_torch(name: str) -> None:
    tensor = every_code(name)
    values = np.empty(tensor.numel())
    data = tensor.view(torch.uint8).numpy().data.cast("B")
    with np.errstate(invalid="ignore"):
        decode(data, DTYPES[name], values, np.empty(values.size, np.uint32))
    expected = tensor.float().double() if DTYPES[name].bits == 8 else tensor.double()
    np.testing.assert_array_equal(values, expected.numpy())


def test_packed_and_complex_dtypes_have_no_values() -> None:
    assert set(DTYPES) - set(NUMBERS) == {"F4", "F6_E2M3", "F6_E3M2", "C64"}


@pytest.mark.parametrize("name", NUMBERS)
def test_two_parts_are_exact(name: str) -> None:
    tensor = every_code(name)
    size = tensor.numel()
    high, low = np.empty(size), np.empty(size)
    data = tensor.view(torch.uint8).numpy().data.cast("B")
    with np.errstate(invalid="ignore"):
        decode_exactly(data, DTYPES[name], high, low, (np.empty(size, np.uint32), np.empty(size)))
    if is_wide(DTYPES[name]):
        assert [int(h) + int(v) for h, v in zip(high, low, strict=True)] == tensor.tolist()
        assert (low >= 0).all()
        assert (low < 2**32).all()
    else:
        assert not low.any()
        expected = tensor.float().double() if DTYPES[name].bits == 8 else tensor.double()
        np.testing.assert_array_equal(high, expected.numpy())
