"""Maxima of blocks, what is computed from them, and outputs with one element per block."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mergeloom.methods import where
from mergeloom.methods.kernel.composition import Composition, Part
from mergeloom.methods.kernel.decoder import Encoder, block_max, next_power_of_two, rounded
from mergeloom.methods.kernel.expression import MethodDefinitionError
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.spec import BLOCK, InputSpec, Unit
from tests.support.methods import oracle
from tests.support.methods.expressions import hard_inputs, random_block_kernel
from tests.support.methods.kernels import kernel_of, run_fused, run_kernel
from tests.support.methods.stored import KEY, KINDS, Maker, merged

SHAPES = ((300, 260), (3, 10, 70), (2, 3, 128, 128), (130, 1), (1, 300), (70,), ())


def function(x: Any) -> Any:
    """Values in units of a power of 2, the powers, and the maxima of other blocks."""
    power = next_power_of_two(block_max(x, 4, 32) / 448.0)
    return where(power > 0, x / power, x), power, block_max(2.0 * x, 6, 50)


UNITS = Encoder("units", function, 3)
DTYPES = (torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16)


def assert_same(kernel: Kernel, inputs: list[Tensor], dtypes: tuple[torch.dtype, ...], *lengths: int | None) -> None:
    """Both backends have the oracle's bytes for each output and each length of chunks and tiles."""
    wanted = oracle.evaluate_all(kernel, inputs, key=KEY)
    stored = [oracle.stored(values, dtype) for values, dtype in zip(wanted, dtypes, strict=True)]
    for length in lengths:
        assert run_fused(kernel, inputs, length, out=dtypes, key=KEY, threads=2).outputs == stored
        run = run_kernel(kernel, inputs, length, key=KEY)
        work = run.output.dtype
        found = [oracle.stored(values.numpy(), work) for values in run.outputs]
        assert found == [oracle.stored(values, work) for values in wanted]
        assert run.used <= run.declared


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_of_blocks(shape: tuple[int, ...]) -> None:
    kernel = UNITS.kernel(InputSpec(1, None, shape), {})
    assert [each is None for each in kernel.blocks] == [True, False, False]
    for seed in range(2):
        (values,) = hard_inputs(4 * seed + 1, 1, shape, finite=seed == 0)
        assert_same(kernel, [values], DTYPES, None, 1, 1 << 16)


@pytest.mark.parametrize("seed", range(8))
def test_random_expressions_of_blocks(seed: int) -> None:
    for shape in SHAPES[:2]:
        kernel = random_block_kernel(seed, 2, shape)
        inputs = hard_inputs(seed, 2, shape, finite=seed % 2 == 0)
        work = torch.float64 if any(x.dtype is torch.float64 for x in inputs) else torch.float32
        assert_same(kernel, inputs, (work,) * 3, None, 1)


def test_a_nan_and_an_infinity_stay_in_their_block() -> None:
    kernel = Encoder("maxima", lambda x: (1.0 * x, block_max(x, 2, 4)), 2).kernel(InputSpec(1, None, (5, 9)), {})
    values = torch.arange(45.0).view(5, 9) - 20
    values[0, 0], values[3, 5], values[4, 8] = math.nan, -math.inf, -math.nan
    run = run_fused(kernel, [values], out=(torch.float32, torch.float32))
    found = torch.frombuffer(bytearray(run.outputs[1]), dtype=torch.float32).view(3, 3)
    wanted = torch.tensor([[math.nan, 16, 12], [10, math.inf, 15], [19, 23, math.nan]])
    assert torch.equal(found.nan_to_num(nan=-1.0), wanted.nan_to_num(nan=-1.0))
    assert kernel.propagates_nonfinite
    assert run.beyond


@pytest.mark.parametrize("function", [lambda x: block_max(x, 3, 5), lambda x: rounded(block_max(x, 3, 5), "bfloat16")])
def test_the_first_output_has_one_element_for_each_of_the_value(function: Any) -> None:
    kernel = Encoder("one", function, 1).kernel(InputSpec(1, None, (7, 11)), {})
    assert kernel.blocks == (None,)
    assert_same(kernel, [torch.randn(7, 11, generator=torch.Generator().manual_seed(1))], (torch.float32,), None, 1)


# ------------------------------------------------------------------------------------------------ tiles


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((300, 260), 12),
        ((10, 70), 10),  # one matrix with fewer rows than two rows of blocks
        ((3, 24, 70), 12),
        ((3, 10, 70), 10),  # the last row of blocks of each matrix is partial
        ((3, 2, 30, 70), 30),
        ((70,), 1),
    ],
)
def test_tiles_have_complete_rows_of_blocks(shape: tuple[int, ...], rows: int) -> None:
    """Those of 4 and of 6 rows, in each matrix of a stack."""
    kernel = UNITS.kernel(InputSpec(1, None, shape), {})
    assert kernel.unit is Unit.BLOCK_ROW
    assert kernel.alignment == rows * shape[-1]


def test_the_blocks_of_sums_are_rows_that_divide_a_row_of_blocks() -> None:
    """So tiles of a kernel with sums are not larger than without them."""

    def centered(t: Any) -> Any:
        mean = t.sum(t.other) / t.size
        return (t.other - mean) / block_max(t.other - mean, 12, 64)

    kernel = kernel_of(centered, 1, None, (100, 15_000))
    assert kernel.reduced[0].value.block == 3 * 15_000
    assert kernel.alignment == 12 * 15_000
    (values,) = hard_inputs(1, 1, (100, 15_000), finite=True)
    assert_same(kernel, [values], (torch.float32,), None, 1)


@pytest.mark.parametrize("shape", [(300, 260), (5, 61, 130), (40, 4096)])
def test_selections_among_values_in_units_of_their_block(shape: tuple[int, ...]) -> None:
    """Ties end within a block of the selection, whose magnitudes are computed again from complete rows of blocks."""

    def selected(t: Any) -> Any:
        x = t.other / block_max(t.other, 8, 32)
        return where(t.largest(x, t.size // 3), x, 0.0)

    generator = torch.Generator().manual_seed(3)
    values = torch.randint(-3, 4, shape, generator=generator).to(torch.float32)
    kernel = kernel_of(selected, 1, None, shape)
    assert_same(kernel, [values], (torch.float32,), None, 1)


def test_a_selection_of_a_part_among_ranks_of_another_one() -> None:
    """The selection's blocks do not begin at rows, but the ranks of complete rows are needed."""
    shape = (400, 300)
    ranked = kernel_of(lambda t: t.row_rank(t.other), 1, None, shape)
    chosen = kernel_of(lambda t: where(t.largest(t.other, t.size // 5 + 300), t.other, 0.0), 1, None, shape)
    kernel = Composition(InputSpec(1, None, shape), [Part(ranked, (0,)), Part(chosen, (~0,))])
    assert kernel.reduced[0].value.block == BLOCK
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    assert_same(kernel, [values], (torch.float32,), None, 1)


@pytest.mark.parametrize("method", ["slerp", "linear", "della"])
def test_an_encoder_of_a_merge_of_stored_parts(method: str) -> None:
    parameters: dict[str, Any] = {
        "linear": {"weight": (0.7, 0.4)},
        "slerp": {"t": 0.3},
        "della": {"weight": (0.0, 1.0), "density": (1.0, 0.4), "epsilon": (0.0, 0.1)},
    }[method]
    shape = (300, 260)
    models = [KINDS[kind](Maker(1, shape)) for kind in ("fp8_blocks", "adapted")]
    kernel, parts = merged(method, models, shape, parameters, None if method == "linear" else 0)
    last = Part(UNITS.kernel(InputSpec(1, None, shape), {}), (~(len(kernel.parts) - 1),))
    assert_same(Composition(kernel.inputs, [*kernel.parts, last]), parts, DTYPES, None, 1)


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (4, -1), (1.5, 4)])
def test_a_block_has_elements(rows: Any, columns: Any) -> None:
    with pytest.raises(MethodDefinitionError, match=r"test_blocks\.py:\d+: block_max takes the rows and the columns"):
        kernel_of(lambda t: block_max(t.other, rows, columns), 1, None, (6, 8))


def test_there_are_no_blocks_of_values_per_row() -> None:
    with pytest.raises(MethodDefinitionError, match=r"test_blocks\.py:\d+: a reduction needs an array"):
        kernel_of(lambda t: block_max(t.row_sum(t.other), 2, 2) + t.other, 1, None, (6, 8))
