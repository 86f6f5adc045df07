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
from tests.support.methods.kernels import run_fused, run_kernel

KINDS = ("F32", "BF16", "F8_E8M0", "F32 power", "BF16 power")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E8M0": torch.float8_e8m0fnu}
SIZES = {"some": [(300, 260), (3, 200, 130), (128, 256), (1, 5), (7,)], "many": [(3584, 2900)]}


def encoder(kind: str, shape: tuple[int, ...], rows: int = 128, columns: int = 128) -> tuple[Kernel, torch.dtype]:
    """An encoder of one of the kinds of scales, and their dtype."""
    name, _, power = kind.partition(" ")
    parameters = {"rows": rows, "columns": columns, "scale_dtype": name, "power_of_two": bool(power)}
    return FP8_BLOCKS.kernel(InputSpec(1, None, shape), parameters), DTYPES[name]


def in_blocks(values: Tensor, rows: int, columns: int) -> Tensor:
    """Matrices padded with zeros, of shape (stack, rows of blocks, rows, blocks, columns)."""
    stack = values.reshape(-1, *((1, 1, *values.shape)[-2:]))
    _, height, width = stack.shape
    padded = torch.nn.functional.pad(stack, (0, -width % columns, 0, -height % rows))
    return padded.view(len(stack), -(-height // rows), rows, -(-width // columns), columns)


def reference(values: Tensor, kind: str, rows: int = 128, columns: int = 128) -> tuple[bytes, bytes]:
    """The bytes of the codes and of the scales."""
    blocks = in_blocks(values.to(torch.float32), rows, columns)
    largest = blocks.abs().amax((2, 4), keepdim=True)
    scales = torch.where(largest == 0, 1.0, largest.clamp(min=1e-12) / 448)
    name, _, power = kind.partition(" ")
    if power or name == "F8_E8M0":
        fractions, exponents = torch.frexp(scales)
        scales = torch.ldexp(torch.ones_like(scales), exponents - (fractions == 0.5).int())
    stored = scales.to(DTYPES[name])
    codes = (blocks / stored.to(torch.float32)).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32)
    stack, height, width = len(blocks), *((1, 1, *values.shape)[-2:])
    whole = codes.reshape(stack, blocks.shape[1] * rows, -1)[:, :height, :width].reshape(-1)
    as_bytes = [x.contiguous().view(torch.uint8).numpy().tobytes() for x in (whole.to(torch.float8_e4m3fn), stored)]
    return as_bytes[0], as_bytes[1]


def hard_values(shape: tuple[int, ...], seed: int) -> Tensor:
    """Values with many magnitudes: ties between codes, subnormal codes, blocks of zeros and of tiny values."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).nan_to_num(nan=0.0)
    numbers = codes.sort().values
    ties = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
    drawn = ties[torch.randint(len(ties), shape, generator=generator)]
    octaves = torch.randint(-24, 1, shape, generator=generator)
    chosen = torch.rand(shape, generator=generator)
    values = torch.where(chosen < 0.4, drawn, torch.where(chosen < 0.6, torch.ldexp(values, octaves), values))
    if len(shape) > 1:
        lines = values.view(-1, shape[-1])
        lines[: max(1, len(lines) // 4), : shape[-1] // 2] *= 2.0**-30
        lines[len(lines) // 2 :, shape[-1] // 2 :] = -0.0
        lines[: len(lines) // 3, shape[-1] // 2 :] *= 2.0**-60
    return values


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
    with pytest.raises(MethodDefinitionError, match="scales can be stored as F32, BF16, F8_E8M0, and not as F16"):
        FP8_BLOCKS.kernel(InputSpec(1, None, (4, 4)), parameters)
