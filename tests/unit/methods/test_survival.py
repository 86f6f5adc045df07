"""The sums of what rounding keeps of a change: the oracle's for both backends and any tiles, and those of float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergeloom.methods import merge_methods
from mergeloom.methods.formats.fp8_encoder import FP8_BLOCKS
from mergeloom.methods.kernel.composition import Composition, Part
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.reduction.survival import Compared
from mergeloom.methods.kernel.spec import BLOCK, InputSpec
from tests.support.methods import oracle
from tests.support.methods.fp8_reference import DTYPES
from tests.support.methods.kernels import run_fused, run_kernel

SHAPES = [(300, 260), (3, 200, 130), (130, 5000), (2, 1), (7,), (40, 2048)]
METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weight": (0.0, 0.3)},
    "slerp": {"t": 0.4},
    "della": {"weight": (0.0, 1.0), "density": (1.0, 0.4), "epsilon": (0.0, 0.1)},
}
FORMS = ["bfloat16", "float16", "F32", "BF16", "F8_E8M0", "rows"]


def models(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """A base and a model that differs by up to a few steps of the grids of 8 bits."""
    generator = torch.Generator().manual_seed(sum(shape))
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    change = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1
    return [base.to(dtype), (base + change).to(dtype)]


def compared(method: str, shape: tuple[int, ...], form: str) -> tuple[Kernel, list[torch.dtype]]:
    """The kernel of a method whose rounded output is compared with its base, and the dtypes of its outputs."""
    spec, parameters = InputSpec(2, 0, shape), METHODS[method]
    if form in ("bfloat16", "float16"):
        return Compared(merge_methods()[method], 0, form).kernel(spec, parameters), [getattr(torch, form)]
    scales = "F32" if form == "rows" else form
    blocks = {"rows": 1, "columns": shape[-1]} if form == "rows" else {"rows": 32, "columns": 48}
    encoder = FP8_BLOCKS.kernel(InputSpec(2, None, shape), {**blocks, "scale_dtype": scales})
    parts = [Part(merge_methods()[method].kernel(spec, parameters), (0, 1), 5, (0, 1)), Part(encoder, (~0, 0))]
    return Composition(spec, parts), [torch.float8_e4m3fn, DTYPES[scales]]


def sums_of(blocks: Sequence[Sequence[float]]) -> list[float]:
    """The sums over a tensor."""
    return [math.fsum(each) for each in blocks]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_both_backends_have_the_sums_of_the_oracle(method: str, form: str) -> None:
    for shape in SHAPES:
        kernel, outs = compared(method, shape, form)
        inputs = models(shape)
        wanted = oracle.evaluate_byproducts(kernel, inputs, key=3)
        assert len(wanted) == 2
        assert wanted[1] > 0 or math.prod(shape) < 8
        runs = [run_fused(kernel, inputs, length, out=outs, key=3, threads=n) for length, n in ((None, 1), (1, 2))]
        tiled = [run_kernel(kernel, inputs, length, key=3) for length in (None, 1)]
        blocks = [run.byproducts for run in (*runs, *tiled)]
        assert all(each == blocks[0] for each in blocks)
        assert sums_of(blocks[0]) == wanted
        assert all(run.used <= run.declared for run in tiled)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_are_those_without_a_comparison(form: str) -> None:
    shape = (200, 4100)
    kernel, outs = compared("task_arithmetic", shape, form)
    inputs = models(shape)
    plain = merge_methods()["task_arithmetic"].kernel(InputSpec(2, 0, shape), METHODS["task_arithmetic"])
    if len(outs) > 1:
        encoder = FP8_BLOCKS.kernel(InputSpec(1, None, shape), dict(kernel.bound[1]))
        plain = Composition(InputSpec(2, 0, shape), [Part(plain, (0, 1)), Part(encoder, (~0,))])
    assert not plain.byproducts
    assert kernel.alignment < plain.alignment + BLOCK  # blocks of sums are complete rows, at least 2^15 elements
    assert run_fused(kernel, inputs, 1, out=outs).outputs == run_fused(plain, inputs, 1, out=outs).outputs


@pytest.mark.parametrize("source", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_share_is_that_of_float64(form: str, source: torch.dtype) -> None:
    """Values, codes and scales are those of the output; only the sums are computed again."""
    shape = (150, 300)
    kernel, outs = compared("task_arithmetic", shape, form)
    inputs = models(shape, source)
    run = run_fused(kernel, inputs, out=outs)
    base = inputs[0].double().numpy()
    work = np.float64 if source is torch.float64 else np.float32
    weight = float(np.float32(0.3))
    value = base.astype(work) + work(weight) * (inputs[1].numpy().astype(work) - base.astype(work))
    if len(outs) > 1:
        value = value.astype(np.float32)
    stored = _decoded(run.outputs, outs, shape, form)
    change, kept = value.astype(np.float64) - base, stored - base
    found, wanted = sums_of(run.byproducts), [float((kept * change).sum()), float((change * change).sum())]
    # each difference and product is rounded, and each total of up to 2^4 summands and more for narrow rows
    bound = 2.0**-24 * (4 + shape[0]) * float(np.abs(kept * change).sum())
    assert abs(found[0] - wanted[0]) <= bound
    assert abs(found[1] - wanted[1]) <= 2.0**-24 * (4 + shape[0]) * wanted[1]


def _decoded(outputs: Sequence[bytes], dtypes: Sequence[torch.dtype], shape: tuple[int, ...], form: str) -> Any:
    tensors = [torch.frombuffer(bytearray(x), dtype=torch.uint8).view(t) for x, t in zip(outputs, dtypes, strict=True)]
    if len(tensors) == 1:
        return tensors[0].view(shape).double().numpy()
    rows, columns = (1, shape[-1]) if form == "rows" else (32, 48)
    counts = -(-shape[0] // rows), -(-shape[1] // columns)
    scales = tensors[1].view(counts).double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return (tensors[0].view(shape).double() * scales[: shape[0], : shape[1]]).numpy()


def test_nothing_is_compared_with_a_base_that_the_output_does_not_use() -> None:
    shape = (64, 96)
    linear = merge_methods()["linear"]
    kernel = Compared(linear, 0, "bfloat16").kernel(InputSpec(2, 0, shape), {"weight": (0.0, 1.5)})
    assert not kernel.byproducts
    encoder = FP8_BLOCKS.kernel(InputSpec(2, None, shape), {"rows": 32, "columns": 32, "scale_dtype": "F32"})
    unused = linear.kernel(InputSpec(2, None, shape), {"weight": (0.0, 1.5)})
    whole = Composition(InputSpec(2, None, shape), [Part(unused, (0, 1)), Part(encoder, (~0, 0))])
    assert not whole.byproducts
    assert not whole.with_used_inputs().byproducts


def test_a_copy_is_not_compared() -> None:
    kernel = Compared(merge_methods()["linear"], 0, "bfloat16").kernel(InputSpec(1, None, (4, 4)), {"weight": (1.0,)})
    assert kernel.copies == 0
    assert not kernel.byproducts


@pytest.mark.parametrize("form", FORMS[:-1])
def test_a_kernel_of_another_shape_is_compared_as_well(form: str) -> None:
    kernel, outs = compared("slerp", (64, 128), form)
    other, _ = compared("slerp", (96, 160), form)
    inputs = models((96, 160))
    resized = kernel.resized((96, 160))
    assert run_fused(resized, inputs, out=outs).byproducts == run_fused(other, inputs, out=outs).byproducts
    assert len(resized.byproducts) == 2


def test_without_a_change_both_sums_are_zero() -> None:
    shape = (64, 128)
    kernel, outs = compared("task_arithmetic", shape, "F32")
    same = models(shape)[0]
    assert sums_of(run_fused(kernel, [same, same], out=outs).byproducts)[1] == 0
