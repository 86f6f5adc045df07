"""The inner loops: compiled if TorchScript is available, with the same results as the Python functions."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mergeloom.methods.kernel import mask_ops, ops

SIZE = 3001


def floats(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tensors with some zeros of either sign."""
    generator = torch.Generator().manual_seed(count)
    made = [torch.randn(SIZE, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]
    for tensor in made:
        tensor[::7] = 0.0
        tensor[::11] = -0.0
    return made


def integers(dtype: torch.dtype, size: int = SIZE) -> Tensor:
    """Integers over the full range of a dtype."""
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max, (size,), dtype=dtype, generator=torch.Generator().manual_seed(1))


def consensus_arguments(
    models: int, dtype: torch.dtype, divisors: list[float], factors: list[float], floor: float
) -> list[Any]:
    """Arguments of `ops.sign_consensus_sum`."""
    terms = floats(models, dtype)
    sign, agree, divisor = (torch.zeros(SIZE, dtype=dtype) for _ in range(3))
    bits = [ops.bits(term) for term in terms]
    return [
        terms[0],
        terms,
        bits,
        [0.5, 1.0, 2.0, 0.25][:models],
        divisors,
        factors,
        floor,
        sign,
        ops.bits(sign),
        agree,
        divisor,
    ]


def bounds_arguments(size: int, opposite: bool) -> list[Any]:
    """Arguments of `mask_ops.below_bounds`, for blocks of 512 elements and 64 columns."""
    bounds = integers(torch.int8, 64 * -(-size // 512)).view(-1, 64)
    return [
        torch.zeros(size),
        integers(torch.int8, size + 3),
        bounds,
        opposite,
        512,
        torch.zeros(size + 3).to(torch.int8),
    ]


def stream(size: int) -> mask_ops.HashStream:
    """A stream of so many hashes, in columns of 64."""
    return mask_ops.HashStream(
        integers(torch.int32, 64), integers(torch.int32, size), -5, 77, 0x7FEB352D, -(1 << 31), 77
    )


def masks(size: int) -> list[mask_ops.Mask]:
    """Two masks, for blocks of 512 elements and 64 columns."""
    bounds = integers(torch.int8, 64 * -(-size // 512)).view(-1, 64)
    middle = size // 3 // 4 * 4
    return [
        mask_ops.Mask(0, middle, stream(size), bounds, True, 512, 1.5),
        mask_ops.Mask(middle, size, stream(size), bounds, False, 512, 1.0),
    ]


def scratch(size: int) -> mask_ops.Scratch:
    """What masks of so many values need."""
    hashes, other = (torch.zeros(-(-size // 4), dtype=torch.int32) for _ in range(2))
    return mask_ops.Scratch(
        hashes, hashes.view(torch.int8), other, torch.zeros(size, dtype=torch.int8), torch.zeros(size)
    )


def places(tensors: int, *, at_once: bool = False) -> ops.BlockSumBuffers:
    """Where `ops.block_sums` puts its sums: two blocks of four rows of 64 elements, and what is left of `SIZE`."""
    rest = SIZE - 512
    sums = [torch.zeros(tensors, 2, 64, dtype=torch.float64), torch.zeros(tensors, 1, rest, dtype=torch.float64)]
    return ops.BlockSumBuffers(sums, [[0, 512, 4], [512, SIZE, 0]], torch.zeros(2, 64), at_once)


def in_sums(function: Callable[..., Tensor], tensors: int) -> Callable[..., Tensor]:
    """The function, called with `places` after its arguments; it gives the sums."""

    def run(*arguments: object) -> Tensor:
        into = places(tensors)
        function(*arguments, into)
        return torch.cat([part.flatten() for part in into.sums])

    return run


CALLS: dict[str, tuple[Callable[..., Tensor], Callable[[], list[Any]]]] = {
    "difference": (ops.difference, lambda: [torch.zeros(SIZE), *floats(2), False]),
    "absolute difference": (ops.difference, lambda: [torch.zeros(SIZE), *floats(2), True]),
    "add_to_base": (ops.add_to_base, lambda: [*floats(2)[:1], 0.3, *floats(2)]),
    "accumulate": (ops.accumulate, lambda: [*floats(2), 0.3, False]),
    "accumulate, the first": (ops.accumulate, lambda: [floats(1)[0], floats(1)[0], 0.3, True]),
    "pairwise_fold": (ops.pairwise_fold, lambda: [torch.stack(floats(3, torch.float64)), 1]),
    "rounded": (ops.rounded, lambda: [torch.zeros(SIZE, dtype=torch.bfloat16), floats(1)[0]]),
    "hard_band": (ops.hard_band, lambda: [*floats(2), 100, [0.5, 0.6], 2000, [1.5, 1.6]]),
    "hard_band, all of the small": (ops.hard_band, lambda: [*floats(2), 0, [], 5, [1.5, 1.6]]),
    "hard_band, all of the large": (ops.hard_band, lambda: [*floats(2), SIZE, [0.5, 0.6], 0, []]),
    "apply_mask": (mask_ops.apply_mask, lambda: [floats(1)[0], masks(SIZE), scratch(SIZE)]),
    "masked_deltas": (
        mask_ops.masked_deltas,
        lambda: [floats(1)[0], floats(2), floats(2, torch.bfloat16), [masks(SIZE), []], scratch(SIZE)],
    ),
    "masked_l1_sums": (
        mask_ops.masked_l1_sums,
        lambda: [*floats(2), floats(2, torch.bfloat16), [[], masks(SIZE)], scratch(SIZE), places(4)],
    ),
    "gram": (ops.gram, lambda: [floats(1)[0], floats(3), floats(3, torch.bfloat16), floats(1)[0], places(6)]),
    "block_sums": (ops.block_sums, lambda: [floats(1)[0], 1, places(2)]),
    "weighted_sum": (ops.weighted_sum, lambda: [*floats(2), floats(3, torch.bfloat16), [0.5, 1.0, -2.0], None]),
    "weighted_sum from an origin": (
        ops.weighted_sum,
        lambda: [*floats(2), floats(3, torch.bfloat16), [0.5, 1.0, -2.0], floats(4)[3]],
    ),
    "sign_consensus_sum": (ops.sign_consensus_sum, lambda: consensus_arguments(3, torch.float32, [], [], 0.0)),
    "sign_consensus_sum, a mean": (
        ops.sign_consensus_sum,
        lambda: consensus_arguments(3, torch.float32, [1.0, 0.5, 2.0], [], 0.0),
    ),
    "sign_consensus_sum, factors": (
        ops.sign_consensus_sum,
        lambda: consensus_arguments(4, torch.float32, [0.1] * 4, [1.0, 2.0, 3.0, 4.0], 1e-6),
    ),
    "sign_consensus_sum, float64": (
        ops.sign_consensus_sum,
        lambda: consensus_arguments(2, torch.float64, [1.0, 1.0], [], 0.0),
    ),
    "sign_consensus_sum, one": (ops.sign_consensus_sum, lambda: consensus_arguments(1, torch.float32, [1.0], [], 0.0)),
    "hash_indices": (
        mask_ops.hash_indices,
        lambda: [
            torch.zeros(SIZE, dtype=torch.int32),
            torch.zeros(SIZE, dtype=torch.int32),
            stream(SIZE),
        ],
    ),
    **{
        f"below_bounds, {size}{', opposite' * opposite}": (
            mask_ops.below_bounds,
            lambda size=size, opposite=opposite: bounds_arguments(size, opposite),
        )
        for size in (1, 63, 64, 511, 512, 1024, 1500, 1537)
        for opposite in (False, True)
    },
}


def tensors(values: object) -> Iterator[Tensor]:
    """All tensors in nested lists and tuples."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors(value)


@pytest.mark.parametrize("call", CALLS)
def test_the_same_bytes_as_the_function(call: str) -> None:
    """The return value and all arguments, which are modified in place."""
    function, arguments = CALLS[call]
    compiled, plain = arguments(), arguments()
    compiled.append(function(*compiled))
    plain.append(function.__wrapped__(*plain))  # type: ignore[attr-defined]
    for found, wanted in zip(tensors(compiled), tensors(plain), strict=True):
        assert torch.equal(found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch has no TorchScript for this Python")
@pytest.mark.parametrize("call", CALLS)
def test_it_is_compiled(call: str) -> None:
    function, _ = CALLS[call]
    assert isinstance(ops._compiled(function.__wrapped__), torch.jit.ScriptFunction)  # type: ignore[attr-defined]


def test_without_torchscript_it_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(function: object) -> object:
        raise RuntimeError("torch.jit.script is not supported")

    monkeypatch.setattr(torch.jit, "script", none)
    run = ops.scripted(lambda out, x: out.add_(x))
    assert float(run(torch.ones(1), torch.ones(1))) == 2


@pytest.mark.parametrize(("size", "opposite"), [(1500, False), (1537, True), (63, False)])
def test_below_bounds_compares_with_the_bound_of_the_block(size: int, opposite: bool) -> None:
    out, values, bounds, _, block, flags = bounds_arguments(size, opposite)
    mask_ops.below_bounds(out, values, bounds, opposite, block, flags)
    for place in range(size):
        less = int(values[place]) < int(bounds[place // block, place % 64])
        assert out[place] == (less != opposite)


def test_hard_band_keeps_the_values_in_the_band() -> None:
    """Bounds change at their index, and values that are not finite stay visible."""
    inf = float("inf")
    values = [1.0, -1.0, 2.0, 1.0, -1.0, 2.0, -3.0, inf, float("nan"), 4.0, 0.0]
    found = ops.hard_band(torch.tensor(values), torch.zeros(11), 3, [0.5, 1.0], 10, [2.5, 5.0]).tolist()
    assert found[:7] == [1.0, -1.0, 2.0, 0.0, 0.0, 2.0, 0.0]
    assert not any(map(math.isfinite, found[7:9]))
    assert found[9:] == [0.0, 0.0]
    kept = ops.hard_band(torch.tensor(values), torch.zeros(11), 3, [0.5, 1.0], 0, []).tolist()
    assert kept[:8] == [1.0, -1.0, 2.0, 0.0, 0.0, 2.0, -3.0, inf]
    nothing = ops.hard_band(torch.full((SIZE,), math.nan), torch.zeros(SIZE), 3, [0.5, 1.0], 10, [2.5, 5.0])
    assert bool(nothing.isnan().all())  # in vectors of the processor as in what is left over: once, torch's differed


def test_apply_mask_hashes_and_compares() -> None:
    kept = mask_ops.apply_mask(torch.ones(SIZE), masks(SIZE), scratch(SIZE))
    for mask in masks(SIZE):
        size = mask.end - mask.begin
        hashes, other = (torch.zeros(-(-size // 4), dtype=torch.int32) for _ in range(2))
        octets = mask_ops.hash_indices(hashes, other, mask.stream).view(torch.int8)
        flags = torch.zeros(size, dtype=torch.int8)
        wanted = mask_ops.below_bounds(torch.zeros(size), octets, mask.bounds, mask.opposite, mask.block, flags)
        assert 0 < wanted.mean() < 1
        assert torch.equal(kept[mask.begin : mask.end], wanted * mask.factor)


def test_masked_deltas_applies_the_masks_to_differences() -> None:
    base, inputs, vectors = floats(1)[0], floats(2, torch.bfloat16), [torch.zeros(SIZE) for _ in range(2)]
    mask_ops.masked_deltas(base, vectors, inputs, [masks(SIZE), []], scratch(SIZE))
    assert torch.equal(vectors[0], mask_ops.apply_mask(inputs[0].float() - base, masks(SIZE), scratch(SIZE)))
    assert torch.equal(vectors[1], inputs[1].float() - base)


@pytest.mark.parametrize("at_once", [False, True])
def test_block_sums_add_rows_in_order(at_once: bool) -> None:
    """Complete blocks add their rows in order in the work dtype; the rest is copied in float64."""
    values = floats(1)[0]
    into = places(2, at_once=at_once)
    ops.block_sums(values, 1, into)
    blocks, rest = into.sums
    for block in range(2):
        rows = values[256 * block : 256 * block + 256].view(4, 64)
        assert torch.equal(blocks[1, block], (rows[0] + rows[1] + rows[2] + rows[3]).double())
    assert torch.equal(rest[1, 0], values[512:].double())
    assert not blocks[0].any()
    assert not rest[0].any()


def test_gram_and_sizes_are_sums_of_products_and_of_sizes() -> None:
    inputs, base = floats(3, torch.bfloat16), floats(1)[0]
    vectors = [x.float() - base for x in inputs]

    def summed(values: list[Tensor]) -> Tensor:
        into = places(6)
        for number, each in enumerate(values):
            ops.block_sums(each, number, into)
        return torch.cat([part.flatten() for part in into.sums])

    found = in_sums(ops.gram, 6)(torch.zeros(SIZE), floats(3), inputs, base)
    assert torch.equal(found, summed([vectors[i] * vectors[j] for i in range(3) for j in range(i, 3)]))
    found = in_sums(mask_ops.masked_l1_sums, 6)(
        torch.zeros(SIZE), base, inputs, [masks(SIZE), [], masks(SIZE)], scratch(SIZE)
    )
    sizes = [x.abs() for x in vectors]
    thin = [mask_ops.apply_mask(x.clone(), [] if i == 1 else masks(SIZE), scratch(SIZE)) for i, x in enumerate(sizes)]
    assert torch.equal(found, summed([each for pair in zip(sizes, thin, strict=True) for each in pair]))
