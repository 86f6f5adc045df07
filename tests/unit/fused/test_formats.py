"""Numbers of every format are read exactly and written rounded once, with one NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mergeloom.methods import Array, Inputs
from mergeloom.methods.kernel.fused.compiled import Compiled
from mergeloom.methods.kernel.fused.finite import count_nonfinite, finite
from mergeloom.methods.kernel.fused.formats import FORMATS
from mergeloom.methods.kernel.fused.passes import FusedPass
from mergeloom.methods.kernel.fused.run import Chunk
from tests.support.methods import oracle
from tests.support.methods.kernels import NAMES, kernel_of, run_fused

DTYPES = {name: dtype for dtype, name in NAMES.items() if name in FORMATS}


def all_codes(dtype: torch.dtype) -> Tensor:
    """Every number of a format of up to 16 bits, and of wider ones many, with NaNs of any payload."""
    if dtype.itemsize <= 2:
        integer = np.uint8 if dtype.itemsize == 1 else np.uint16
        return torch.from_numpy(np.arange(256**dtype.itemsize).astype(integer).view(np.uint8)).view(dtype)
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, 80_000, dtype=np.uint8)).view(dtype)


def hard_numbers(dtype: torch.dtype, target: torch.dtype) -> Tensor:
    """Numbers of a format, those halfway between them, and their neighbours."""
    codes = all_codes(target).to(torch.float64)
    codes = codes[torch.isfinite(codes)].sort().values
    middle = (codes[:-1] + codes[1:]) / 2
    ends = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")], dtype=torch.float64)
    largest = codes[-1]
    around = torch.cat([largest * torch.linspace(0.9, 2.1, 500, dtype=torch.float64)])
    wide = torch.cat([codes, middle, ends, around, -around]).to(dtype)
    return torch.cat([wide, torch.nextafter(wide, wide * 2), torch.nextafter(wide, torch.zeros_like(wide))])


def identity(t: Inputs) -> Array:
    """The input."""
    return -1.0 * (-1.0 * t.other)


@pytest.mark.parametrize("source", DTYPES)
def test_every_number_is_read_exactly(source: str) -> None:
    x = all_codes(DTYPES[source])
    kernel = kernel_of(identity, 1, None, tuple(x.shape))
    wanted = oracle.evaluate(kernel, [x])
    work = torch.float64 if source == "F64" else torch.float32
    assert run_fused(kernel, [x]).output == oracle.stored(wanted, work)


@pytest.mark.parametrize("source", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("target", DTYPES)
def test_results_are_rounded_once(source: torch.dtype, target: str) -> None:
    x = hard_numbers(source, DTYPES[target])
    kernel = kernel_of(identity, 1, None, tuple(x.shape))
    run = run_fused(kernel, [x], out=DTYPES[target])
    assert run.output == oracle.stored(x.numpy(), DTYPES[target])
    assert run.beyond


@pytest.mark.parametrize("target", DTYPES)
def test_the_largest_number_is_not_beyond_and_the_next_one_is(target: str) -> None:
    largest = float(torch.finfo(DTYPES[target]).max)
    assert FORMATS[target].maximum == largest
    kernel = kernel_of(identity, 1, None, (3,))
    for source in (torch.float32, torch.float64):
        if target == "F64" and source is torch.float32:
            continue
        x = torch.tensor([largest, -largest, 0.0], dtype=torch.float64).to(source)
        assert not run_fused(kernel, [x], out=DTYPES[target]).beyond
        for place in range(3):
            bad = x.clone()
            bad[place] = float("nan")
            assert run_fused(kernel, [bad], out=DTYPES[target]).beyond
            if target != "F64" and (target, source) != ("F32", torch.float32):
                bad[place] = torch.nextafter(x[0], torch.tensor(torch.inf, dtype=source))
                assert run_fused(kernel, [bad], out=DTYPES[target]).beyond


@pytest.mark.parametrize("name", DTYPES)
def test_nonfinite_elements_are_found(name: str) -> None:
    codes = all_codes(DTYPES[name])
    wanted = ~torch.isfinite(codes.to(torch.float64))
    data = codes.view(torch.uint8).numpy()
    assert count_nonfinite(memoryview(data), name) == int(wanted.sum())
    assert not finite(memoryview(data), name)
    width = codes.element_size()
    usual = codes[~wanted]
    assert finite(memoryview(usual.view(torch.uint8).numpy()), name)
    for place in (0, 17, usual.numel() - 1):  # also where only one element is not finite
        for bad in codes[wanted][:: max(1, int(wanted.sum()) // 5)]:
            changed = usual.clone()
            changed.view(torch.uint8)[place * width : (place + 1) * width] = bad.reshape(1).view(torch.uint8)
            assert not finite(memoryview(changed.view(torch.uint8).numpy()), name)
    assert finite(memoryview(b""), name)


def test_random_numbers_of_a_range_with_two_streams() -> None:
    """The high half of the index changes within the range."""
    first, count, key = (1 << 32) - (1 << 15), 1 << 16, 0x1234_5678_9ABC_DEF1
    kernel = kernel_of(lambda t: t.uniform(t.other) + 0.0 * t.other, 1, None, (1 << 21, 1 << 12))
    compiled = Compiled(kernel, ["F32"], "F32")
    out, zeros = np.empty(count, np.float32), np.zeros(count, np.float32)
    scratch = np.empty(compiled.scratch + 64, np.uint8)
    FusedPass(compiled, None, None, scratch).combine(Chunk([zeros], first, count, key, (5,)), out)
    wanted = oracle.hashes(key, 5, np.arange(first, first + count))
    assert np.array_equal(out, (wanted >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24))
