"""FP8 blocks have the codes and scales of a reference in torch, which pads, reshapes and casts complete tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mergeloom.methods import merge_methods
from mergeloom.methods.formats.fp8_encoder import FP8_BLOCKS
from mergeloom.methods.kernel.composition import Composition, Part
from mergeloom.methods.kernel.expression import MethodDefinitionError
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.spec import InputSpec
from tests.support.methods import oracle
from tests.support.methods.fp8_reference import DTYPES, hard_values, in_blocks, reference
from tests.support.methods.kernels import run_fused, run_kernel

KINDS = ("F32", "BF16", "F8_E8M0", "U8", "F32 power", "BF16 power")
SIZES = {"some": [(300, 260), (3, 200, 130), (128, 256), (1, 5), (7,)], "many": [(3584, 2900)]}


def encoder(kind: str, shape: tuple[int, ...], rows: int = 128, columns: int = 128) -> tuple[Kernel, torch.dtype]:
    """An encoder of one of the kinds of scales, and their dtype."""
    name, _, power = kind.partition(" ")
    parameters = {"rows": rows, "columns": columns, "scale_dtype": name, "power_of_two": bool(power)}
    return FP8_BLOCKS.kernel(InputSpec(1, None, shape), parameters), DTYPES[name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_codes_and_scales_are_those_of_torch(size: str, kind: str) -> None:
    for seed, shape in enumerate(SIZES[size]):
        kernel, dtype = encoder(kind, shape)
        values = hard_values(shape, seed)
        wanted = reference(values, kind)
        run = run_fused(kernel, [values], 1 << 19 if size == "many" else 1, out=(torch.float8_e4m3fn, dtype), threads=2)
        assert run.outputs[1] == wanted[1]
        assert run.outputs[0] == wanted[0]
        assert not run.beyond


def test_the_values_are_hard_to_encode() -> None:
    """They contain halves between codes, subnormal codes, values beyond the largest code, and blocks of zeros."""
    values = hard_values(SIZES["many"][0], 0)
    codes, stored = reference(values, "BF16")
    blocks = in_blocks(values, 128, 128)
    scales = torch.frombuffer(bytearray(stored), dtype=torch.bfloat16).to(torch.float32)
    scaled = (blocks / scales.view(blocks.shape[1], 1, blocks.shape[3], 1)).abs()
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    assert int(torch.isin(scaled, (numbers[1:] + numbers[:-1]) / 2).sum()) > 10_000
    found = torch.frombuffer(bytearray(codes), dtype=torch.uint8)
    assert set(found.unique().tolist()) == set(range(256)) - {0x7F, 0xFF}
    assert int(((found & 0x7F > 0) & (found & 0x7F < 8)).sum()) > 10_000
    assert int((scaled > 448.5).sum()) > 1_000
    assert int((blocks.abs().amax((2, 4)) == 0).sum()) > 100


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_both_backends_agree_with_the_oracle(source: torch.dtype, kind: str) -> None:
    """Values in float64 are rounded to float32 at first."""
    shape = (150, 90)
    kernel, dtype = encoder(kind, shape, 32, 32)
    values = hard_values(shape, 1).to(source)
    if source is torch.float64:
        values = values * (1 + 2.0**-30 * torch.arange(90, dtype=source))
    wanted = oracle.evaluate_all(kernel, [values])
    stored = [oracle.stored(x, to) for x, to in zip(wanted, (torch.float8_e4m3fn, dtype), strict=True)]
    assert stored == list(reference(values, kind, 32, 32))
    assert run_fused(kernel, [values], 1, out=(torch.float8_e4m3fn, dtype)).outputs == stored
    found = run_kernel(kernel, [values], 1).outputs
    assert [x.numpy().tobytes() for x in found] == [x.tobytes() for x in wanted]


@pytest.mark.parametrize("kind", ["F32", "F8_E8M0"])
def test_codes_and_scales_that_are_decoded_are_encoded_to_the_same_values(kind: str) -> None:
    shape = (256, 384)
    kernel, dtype = encoder(kind, shape)
    values = hard_values(shape, 4)

    def decoded(outputs: list[bytes]) -> Tensor:
        codes, scales = (torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in outputs)
        tall = scales.view(dtype).view(2, 3).to(torch.float32).repeat_interleave(128, 0)
        return codes.view(torch.float8_e4m3fn).view(shape).to(torch.float32) * tall.repeat_interleave(128, 1)

    first = decoded(run_fused(kernel, [values], out=(torch.float8_e4m3fn, dtype)).outputs)
    again = decoded(run_fused(kernel, [first], out=(torch.float8_e4m3fn, dtype)).outputs)
    if kind == "F8_E8M0":
        assert torch.equal(first, again)
    else:
        assert torch.allclose(first, again, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_makes_the_scale_so(kind: str, bad: float) -> None:
    kernel, dtype = encoder(kind, (130, 130))
    assert kernel.propagates_nonfinite
    values = hard_values((130, 130), 2)
    values[129, 3] = bad
    run = run_fused(kernel, [values], out=(torch.float8_e4m3fn, dtype))
    scales = torch.frombuffer(bytearray(run.outputs[1]), dtype=torch.uint8).view(dtype).to(torch.float32)
    assert torch.isfinite(scales).tolist() == [True, True, False, True]
    assert run.beyond


def test_a_merge_is_encoded_in_one_kernel() -> None:
    """slerp needs sums over the tensor; the codes are those of its result, which is not rounded before."""
    shape = (300, 200)
    spec = InputSpec(2, 0, shape)
    models = [hard_values(shape, seed).clamp(min=-1, max=1) for seed in range(2)]
    slerp = merge_methods()["slerp"].kernel(spec, {"t": 0.4})
    kernel, dtype = encoder("F32", shape)
    whole = Composition(spec, [Part(slerp, (0, 1)), Part(kernel, (~0,))])
    wanted = reference(torch.from_numpy(oracle.evaluate(slerp, models).copy()), "F32")
    assert run_fused(whole, models, 1, out=(torch.float8_e4m3fn, dtype)).outputs == list(wanted)


def test_scales_of_other_dtypes_are_refused() -> None:
    parameters: dict[str, Any] = {"rows": 2, "columns": 2, "scale_dtype": "F16"}
    with pytest.raises(MethodDefinitionError, match="scales can be stored as F32, BF16, F8_E8M0, U8, and not as F16"):
        FP8_BLOCKS.kernel(InputSpec(1, None, (4, 4)), parameters)
