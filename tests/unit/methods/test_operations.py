"""The operations of arrays on tiles: the same values as numpy's on all elements at once, and sums of fixed blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from mergeloom.methods import (
    Array,
    Inputs,
    add,
    clamp,
    host,
    maximum,
    mean,
    minimum,
    sign,
    single,
    sqrt,
    where,
    wide,
)
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.spec import BLOCK
from mergeloom.methods.kernel.torch_backend import block_sums
from mergeloom.methods.kernel.torch_backend.block_sums import BlockSums, pairwise_fold
from mergeloom.methods.kernel.torch_backend.passes import Pass
from mergeloom.methods.kernel.torch_backend.tile import Tile, Workspace
from tests.support.methods.kernels import kernel_of, run_kernel

Numbers = numpy.ndarray[Any, Any]
SHAPE = (61, 53)
NAN, INF = float("nan"), float("inf")
SPECIAL = (0.0, -0.0, NAN, INF, -INF, 1.0, -1.0, 1e-45, -1e-40, 3.4e38, -3.4e38, 0.1)
CPU = torch.device("cpu")


def special(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Three inputs in which each pair of special values meets, and random numbers."""
    generator = numpy.random.default_rng(3)
    numbers = generator.standard_normal((3, *SHAPE)) * 2.0 ** generator.integers(-30, 30, (3, *SHAPE))
    count = len(SPECIAL)
    flat = numbers.reshape(3, -1)
    flat[0, : count**2] = numpy.repeat(SPECIAL, count)
    flat[1, : count**2] = numpy.tile(SPECIAL, count)
    return [torch.tensor(x).to(dtype) for x in numbers]


def same(found: Tensor, wanted: Numbers) -> bool:
    """Whether all values are equal, with the sign of zeros; a NaN equals any NaN."""
    numbers = found.numpy()
    assert numbers.dtype == wanted.dtype
    nans = numpy.isnan(numbers)
    signs = numpy.signbit(numbers) == numpy.signbit(wanted)
    return bool((numpy.where(nans, numpy.isnan(wanted), (numbers == wanted) & signs)).all())


def number(flags: Any, like: Numbers) -> Numbers:
    return numpy.asarray(flags).astype(like.dtype)


ELEMENTWISE: dict[str, tuple[Callable[..., Array], Callable[..., Any]]] = {
    "x + y": (lambda x, y, z: x + y, lambda x, y, z: x + y),
    "x - y": (lambda x, y, z: x - y, lambda x, y, z: x - y),
    "x * y": (lambda x, y, z: x * y, lambda x, y, z: x * y),
    "x / y": (lambda x, y, z: x / y, lambda x, y, z: x / y),
    "1 - x": (lambda x, y, z: 1 - x, lambda x, y, z: x.dtype.type(1) - x),
    "0 - x is -x": (lambda x, y, z: 0 - x, lambda x, y, z: -x),
    "1 / x": (lambda x, y, z: 1 / x, lambda x, y, z: x.dtype.type(1) / x),
    "0.1 x": (lambda x, y, z: 0.1 * x, lambda x, y, z: x.dtype.type(0.1) * x),
    "x y + z, not fused": (lambda x, y, z: x * y + z, lambda x, y, z: x * y + z),
    "-x": (lambda x, y, z: -x, lambda x, y, z: -x),
    "abs": (lambda x, y, z: abs(x), lambda x, y, z: numpy.abs(x)),
    "sqrt": (lambda x, y, z: sqrt(x), lambda x, y, z: numpy.sqrt(x)),
    "x > y": (lambda x, y, z: (x > y) * 1.0, lambda x, y, z: number(x > y, x)),
    "x >= y": (lambda x, y, z: (x >= y) * 1.0, lambda x, y, z: number(x >= y, x)),
    "x < y": (lambda x, y, z: (x < y) * 1.0, lambda x, y, z: number(x < y, x)),
    "x <= y": (lambda x, y, z: (x <= y) * 1.0, lambda x, y, z: number(x <= y, x)),
    "x == y": (lambda x, y, z: (x == y) * 1.0, lambda x, y, z: number(x == y, x)),
    "x != y": (lambda x, y, z: (x != y) * 1.0, lambda x, y, z: number(x != y, x)),
    "a comparison as the output": (lambda x, y, z: x > y, lambda x, y, z: number(x > y, x)),
    "a comparison used twice": (
        lambda x, y, z: where(x > y, x, z) * (x > y),
        lambda x, y, z: numpy.where(x > y, x, z) * number(x > y, x),
    ),
    "flags": (
        lambda x, y, z: ((x > y) & (z > 0) | ~(y < z)) * x,
        lambda x, y, z: number((x > y) & (z > 0) | ~(y < z), x) * x,
    ),
    "where": (lambda x, y, z: where(z > 0, x, y), lambda x, y, z: numpy.where(z > 0, x, y)),
    "where of numbers": (lambda x, y, z: where(x > y, 2.0, -0.5), lambda x, y, z: number(x > y, x) * 2.5 - 0.5),
    "minimum": (lambda x, y, z: minimum(x, y), lambda x, y, z: numpy.where(y < x, y, x)),
    "maximum": (lambda x, y, z: maximum(x, y), lambda x, y, z: numpy.where(y > x, y, x)),
    "minimum of a number": (
        lambda x, y, z: minimum(x, 0.1),
        lambda x, y, z: numpy.where(x > 0.1, x.dtype.type(0.1), x),
    ),
    "maximum of a number": (
        lambda x, y, z: maximum(x, 0.1),
        lambda x, y, z: numpy.where(x < 0.1, x.dtype.type(0.1), x),
    ),
    "maximum of 0": (lambda x, y, z: maximum(x, 0.0), lambda x, y, z: numpy.where(x < 0, x.dtype.type(0), x)),
    "a number and x": (lambda x, y, z: maximum(0.1, x), lambda x, y, z: numpy.where(x > 0.1, x, x.dtype.type(0.1))),
    "clamp": (
        lambda x, y, z: clamp(x, -1.0, 2.0),
        lambda x, y, z: numpy.where(x < -1, x.dtype.type(-1), numpy.where(x > 2, x.dtype.type(2), x)),
    ),
    "sign": (lambda x, y, z: sign(x), lambda x, y, z: number(x > 0, x) - number(x < 0, x)),
    "add": (lambda x, y, z: add([x, y, z]), lambda x, y, z: (x + y) + z),
    "mean": (lambda x, y, z: mean([x, y, z]), lambda x, y, z: ((x + y) + z) / x.dtype.type(3)),
    "wide": (
        lambda x, y, z: wide(x) * y + z,
        lambda x, y, z: (x.astype(numpy.float64) * y + z).astype(x.dtype),
    ),
    "single": (lambda x, y, z: single(x * y), lambda x, y, z: (x * y).astype(numpy.float32).astype(x.dtype)),
    "one operand twice": (lambda x, y, z: x * x - (x + x), lambda x, y, z: x * x - (x + x)),
    "many uses": (
        lambda x, y, z: (x + y) * (x - y) / (abs(x) + abs(y)) + z * (x + y),
        lambda x, y, z: (x + y) * (x - y) / (numpy.abs(x) + numpy.abs(y)) + z * (x + y),
    ),
}
"""Functions of arrays, and the same with numpy, one operation at a time. Constants have the dtype of the arrays."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_operations_equal_numpys(name: str, dtype: torch.dtype) -> None:
    function, plain = ELEMENTWISE[name]
    inputs = special(dtype)
    kernel = kernel_of(lambda t: function(*t.models), 3, None, SHAPE)
    with numpy.errstate(all="ignore"):
        wanted = plain(*(x.numpy() for x in inputs))
    for tile in (1, None):
        run = run_kernel(kernel, inputs, tile)
        assert same(run.output, wanted)
        assert run.used <= run.declared


def test_no_operation_is_left_out_that_changes_a_value() -> None:
    """x + 0 would turn -0 into 0; 0 x is 0, and a model of weight 0 is not even read."""
    kernel = kernel_of(lambda t: 1 * t.models[0] + 0 + 0.0 * t.models[1], 2, None, (3,))
    assert kernel.used == (0,)
    found = run_kernel(kernel, [torch.tensor([-0.0, NAN, 3.0]), torch.full((3,), NAN)]).output
    assert math.copysign(1, float(found[0])) == -1
    assert (bool(found[1].isnan()), float(found[2])) == (True, 3.0)


# --- reductions ------------------------------------------------------------------------------------------------------


def pairwise(values: Numbers) -> Numbers:
    """The last dimension folded: its second half is added to the first one until one column is left."""
    while values.shape[-1] > 1:
        columns = values.shape[-1]
        half = columns // 2
        values = values.copy()
        values[..., :half] += values[..., columns - half :]
        values = values[..., : columns - half]
    return values


def blockwise(values: Numbers) -> float:
    """The sum of all elements in blocks of 2^15: rows of 2^11 columns in order, then the columns in float64."""
    flat = values.reshape(-1)
    sums = []
    for begin in range(0, len(flat), BLOCK):
        block = flat[begin : begin + BLOCK]
        columns = block[:2048].copy()
        for start in range(2048, len(block), 2048):
            columns[: len(block) - start] += block[start : start + 2048]
        sums.append(float(pairwise(columns.astype(numpy.float64))[0]))
    return math.fsum(sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2048,), (5, 2**15), (333, 311), (3, 5, 7)], ids=str)
def test_sums_are_those_of_fixed_blocks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Over all elements, over rows and over columns, whatever the tiles."""
    x = torch.tensor(numpy.random.default_rng(1).standard_normal(shape)).to(dtype)
    numbers = x.numpy().astype(numpy.float64)
    total = numpy.float32(blockwise(x.numpy() * x.numpy())).astype(x.numpy().dtype)
    rows = pairwise(numbers)
    slices = numbers.reshape(shape[0], -1)
    height = max(32, -(-shape[0] // 128))
    blocks = [functools.reduce(numpy.add, slices[begin : begin + height]) for begin in range(0, shape[0], height)]
    columns = numpy.array([math.fsum(column) for column in zip(*blocks, strict=True)]).reshape(1, *shape[1:])
    for function, wanted in (
        (lambda t: t.other * 0.0 + t.sum(t.other * t.other), numpy.full(shape, total)),
        (lambda t: t.row_sum(t.other), numpy.broadcast_to(rows, shape).astype(x.numpy().dtype)),
        (lambda t: t.column_sum(t.other), numpy.broadcast_to(columns.astype(numpy.float32), shape)),
        (
            lambda t: t.row_sum(t.other) * t.column_sum(t.other),
            (rows * columns.astype(numpy.float32)).astype(x.numpy().dtype),
        ),
    ):
        kernel = kernel_of(function, 1, None, shape)
        for tile in (1, None):
            run = run_kernel(kernel, [x], tile)
            assert same(run.output, numpy.asarray(wanted).astype(x.numpy().dtype))
            assert run.used <= run.declared


@pytest.mark.parametrize("at_once", [False, True])
def test_block_sums_add_rows_in_order(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete blocks add their rows in order in the work dtype, and what is left in float64, like a short rest."""
    monkeypatch.setattr(block_sums, "_sums_in_order", lambda dtype: at_once)
    elements = 2 * BLOCK + 777
    values = torch.randn(elements, generator=torch.Generator().manual_seed(4))
    workspace = Workspace(torch.empty(1 << 20, dtype=torch.uint8), torch.float32)
    sums = BlockSums(2, elements, BLOCK, workspace, CPU)
    sums.add(0, torch.zeros(elements))
    sums.add(1, values)
    found = sums.partial()
    wanted = [blockwise(part.numpy()) for part in values.split(BLOCK)]
    assert found.tolist() == [[0.0] * 3, wanted]
    in_float64 = [float(part.double().sum()) for part in values.split(BLOCK)[:2]]
    assert wanted[:2] != in_float64
    assert wanted[:2] == pytest.approx(in_float64, abs=1e-3)


def test_pairwise_fold_adds_the_second_half_to_the_first() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0], [0.0, 1.0, 0.0, 1.0, 0.0]])
    assert pairwise_fold(values.clone()).tolist() == [[31.0], [2.0]]


def partials(kernel: Kernel, inputs: Sequence[Tensor]) -> list[Any]:
    """The partial results of a kernel's first pass over a single tile."""
    size = inputs[0].numel()
    workspace = Workspace(torch.empty(kernel.workspace(size, 4), dtype=torch.uint8), torch.float32)
    run = Pass(kernel, 0, None, workspace)
    run.reduce(Tile([x.reshape(-1) for x in inputs], workspace, element=0, key=5, positions=range(len(inputs))))
    return run.result()


def test_inner_products_and_norms_are_sums_of_products_and_of_magnitudes() -> None:
    """The partial sums of several arrays do not mix, also where inputs are of another dtype and masked."""
    elements = BLOCK + 3001
    generator = torch.Generator().manual_seed(6)
    inputs = [torch.randn(elements, generator=generator).to(torch.bfloat16) for _ in range(3)]
    inputs.append(torch.randn(elements, generator=generator))
    pairs = [(i, j) for i in range(3) for j in range(i, 3)]

    def method(t: Inputs) -> Array:
        deltas = [x - t.base for x in t.models]
        products = [t.sum(deltas[i] * deltas[j]) for i, j in pairs]
        sizes = [t.sum(abs(d * (t.uniform(x) < 0.5))) for d, x in zip(deltas, t.models, strict=True)]
        return t.base * host(lambda *sums: sum(sums), *products, *sizes)

    kernel = kernel_of(method, 4, 3, (elements,))
    found = partials(kernel, inputs)
    deltas = [(x.float() - inputs[3]).numpy() for x in inputs[:3]]
    mask = kernel_of(lambda t: t.uniform(t.other) < 0.5, 1, None, (elements,))
    drawn = [run_kernel(mask, [x], key=5, positions=[i]).output for i, x in enumerate(inputs[:3])]
    arrays = [deltas[i] * deltas[j] for i, j in pairs]
    arrays += [numpy.abs(d * kept.numpy()) for d, kept in zip(deltas, drawn, strict=True)]
    wanted = [[blockwise(array[:BLOCK]), blockwise(array[BLOCK:])] for array in arrays]
    assert sorted(found) == sorted(wanted)


def test_counts_maxima_and_ranks_of_rows() -> None:
    x = torch.tensor([[3.0, -4.0, 0.0, 3.0], [NAN, 1.0, -INF, 2.0], [-0.0, 0.0, -0.0, 0.0]])

    def run(function: Callable[[Inputs], Array]) -> list[list[float]]:
        rows: list[list[float]] = run_kernel(kernel_of(function, 1, None, (3, 4)), [x]).output.tolist()
        return rows

    assert run(lambda t: t.index) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert run(lambda t: t.index * 0.0 + t.count(t.other > 0))[0] == [4] * 4
    maxima = run(lambda t: t.row_max(t.other))
    assert maxima[0] == [3] * 4
    assert all(math.isnan(value) for value in maxima[1])
    assert [math.copysign(1, value) for value in maxima[2]] == [1] * 4
    ranks = run(lambda t: t.row_rank(t.other))
    assert ranks[0] == [1, 3, 0, 2]  # of equal ones, later ones rank higher
    assert ranks[1] == [3, 0, 2, 1]
    assert ranks[2] == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(33, 7), (3, 5, 7)], ids=str)
def test_operations_on_scalars_rows_and_columns(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Scalars of a reduction can be used like numbers, and those of rows and of columns like arrays."""
    x = torch.tensor(numpy.random.default_rng(2).standard_normal(shape)).to(dtype)
    numbers = x.double()
    total, rows = numbers.sum(), numbers.sum(-1, keepdim=True)
    columns = numbers.sum(0, keepdim=True)
    for function, wanted in (
        (lambda t: t.other * (t.sum(t.other) / 2 - 1), numbers * (total / 2 - 1)),
        (lambda t: where(t.sum(t.other) > 0, t.other, -t.other), numbers * (1 if total > 0 else -1)),
        (lambda t: t.other * maximum(abs(t.sum(t.other)), 1.0), numbers * max(abs(float(total)), 1)),
        (lambda t: t.other * ~(t.sum(t.other) > 1e9), numbers),
        (lambda t: t.other - t.column_sum(t.other) / t.shape[0], numbers - columns / shape[0]),
        (lambda t: where(t.column_sum(t.other) > 0, t.other, 0.0), numbers * (columns > 0)),
        (lambda t: t.other * sqrt(t.column_sum(t.other * t.other)), numbers * (numbers**2).sum(0, keepdim=True).sqrt()),
        (lambda t: t.other * t.column_sum(t.other) * t.sum(t.other), numbers * columns * total),
        (lambda t: t.column_sum(t.other - t.column_sum(t.other)), columns - columns * shape[0]),
        (lambda t: t.other / sqrt(t.row_sum(t.other * t.other)), numbers / (numbers**2).sum(-1, keepdim=True).sqrt()),
        (lambda t: t.other * host(lambda a, b: a + b, t.row_sum(t.other), t.sum(t.other)), numbers * (rows + total)),
        (
            lambda t: t.other * host(lambda a, b: (a, a * b), t.column_sum(t.other), t.sum(t.other), outputs=2)[1],
            numbers * columns * total,
        ),
        (lambda t: t.row_sum(t.other) - t.column_sum(t.other), rows - columns),
    ):
        kernel = kernel_of(function, 1, None, shape)
        for tile in (1, None):
            found = run_kernel(kernel, [x], tile).output.double()
            torch.testing.assert_close(found, wanted.expand(shape), rtol=1e-5, atol=1e-4)


def test_the_number_of_largest_elements() -> None:
    """Below 1 it selects none, from the number of elements on all."""
    x = torch.randn(4, 5)
    for function in (lambda t: t.other * t.largest(t.other, 99), lambda t: t.other * t.largest(t.other, share=1.0)):
        assert torch.equal(run_kernel(kernel_of(function, 1, None, (4, 5)), [x]).output, x)
    nothing = kernel_of(lambda t: t.other + t.other * t.largest(t.other, -1), 1, None, (4, 5))
    assert torch.equal(run_kernel(nothing, [x]).output, x)
