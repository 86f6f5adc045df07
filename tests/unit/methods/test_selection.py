"""Selection of the k largest: exact for any sample, within the declared passes, ties broken by position."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeloom.methods import Array, Inputs, add, where
from mergeloom.methods.kernel import kernel as kernels
from mergeloom.methods.kernel.expression import Type
from mergeloom.methods.kernel.reduction import selection
from mergeloom.methods.kernel.reduction.selection import Search, Threshold, initial_bracket, sample_indices
from mergeloom.methods.kernel.reduction.target import Target
from mergeloom.methods.kernel.torch_backend import counting
from tests.examples import examples
from tests.support.methods.kernels import kernel_of, run_kernel

BLOCK = 64


def chosen(t: Inputs, x: Array, target: Target) -> Array:
    """Whether each element is among those of a target: `Inputs.largest` without its shortcuts for none and all."""
    magnitudes = t.trace.unary("abs", x.node)
    return Array(t.trace.node("selected", (magnitudes, t._target(x, target)), Type.FLAG), t.trace)


def select(values: Tensor, targets: list[Target], tile: int, *, sampled: bool = True) -> tuple[list[Tensor], int]:
    """For each target the mask of its elements, and the number of passes that it took."""

    def method(t: Inputs) -> Array:
        x = t.other if sampled else where(t.index >= 0, t.other, 0.0)  # which takes no sample
        return add([chosen(t, x, target) * 2.0**number for number, target in enumerate(targets)])

    kernel = kernel_of(method, 1, None, (len(values),))
    (reduced,) = kernel.reduced
    assert reduced.value.sampled == sampled
    run = run_kernel(kernel, [values], tile)
    masks = [run.output.long() >> number & 1 for number in range(len(targets))]
    return [mask.float() for mask in masks], run.passes - 1


def highest(values: Tensor, rank: int) -> Tensor:
    mask = torch.zeros(len(values))
    mask[torch.argsort(values, descending=True, stable=True)[:rank]] = 1
    return mask


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small blocks, of which a few hundred elements have many."""
    monkeypatch.setattr(kernels, "BLOCK", BLOCK)


@pytest.mark.usefixtures("small")
@settings(deadline=None, max_examples=examples(150))
@given(
    seed=st.integers(0, 1 << 30),
    size=st.integers(1, 1500),
    levels=st.sampled_from([1, 2, 3, 10, 1000, 0]),
    share=st.floats(0, 1),
    tile=st.sampled_from([1, 3, 100]),
    runs=st.sampled_from([1, 3, 1 << 12]),
    bins=st.sampled_from([2, 16]),
)
def test_exact_for_any_sample(seed: int, size: int, levels: int, share: float, tile: int, runs: int, bins: int) -> None:
    generator = numpy.random.default_rng(seed)
    array = generator.standard_normal(size).astype(numpy.float32) ** 2
    if levels:
        array = numpy.floor(array * levels).astype(numpy.float32)
    if seed % 3 == 0:
        array.sort()  # a sample of neighbours is as bad as it can be
    values = torch.from_numpy(array)
    ranks = [max(1, int(share * size)), 1, size]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_RUNS", runs)
        patch.setattr(selection, "_GUESSED_BINS", bins)
        masks, passes = select(values, [Target(rank) for rank in ranks], tile * BLOCK)
    assert passes <= 5
    for mask, rank in zip(masks, ranks, strict=True):
        assert torch.equal(mask, highest(values, rank))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 1.0])
@pytest.mark.parametrize("zeros", [0.0, 0.6, 1.0])
def test_share_of_the_elements_above_0(share: float, zeros: float) -> None:
    generator = numpy.random.default_rng(0)
    array = numpy.abs(generator.standard_normal(70_000)).astype(numpy.float32)
    array[generator.random(70_000) < zeros] = 0
    values = torch.from_numpy(array)
    (mask,), _ = select(values, [Target(None, share=share)], 10 * BLOCK)
    assert torch.equal(mask, highest(values, int(share * int((values > 0).sum()))))


def test_few_passes_where_values_have_few_bits() -> None:
    generator = numpy.random.default_rng(1)
    values = torch.from_numpy(numpy.abs(generator.standard_normal(300_000)).astype(numpy.float32))
    ranks = [Target(100_000), Target(3_000)]
    assert select(values.mul(8).round(), ranks[:1], 1 << 15)[1] == 2
    assert select(values, ranks, 1 << 15)[1] <= 4


def test_magnitudes_alone_take_two_passes() -> None:
    """Where no sample can be taken, and ties do not matter."""
    generator = numpy.random.default_rng(2)
    values = torch.from_numpy(generator.standard_normal(100_000).astype(numpy.float32))
    for exponent in (-30, 0, 30):
        numbers = values * 2.0**exponent
        kernel = kernel_of(lambda t: t.kth_largest(where(t.index >= 0, t.other, 0.0), 5), 1, None, (100_000,))
        run = run_kernel(kernel, [numbers], 1 << 15)
        assert run.passes - 1 == 2
        assert set(run.output.tolist()) == {float(numbers.abs().sort(descending=True).values[4])}


def test_a_nan_is_not_selected_and_not_hidden() -> None:
    values = torch.rand(40_000)
    values[17] = float("nan")
    values[1700] = float("inf")
    (mask,), _ = select(values, [Target(10)], 1 << 15)
    assert mask.sum() == 9  # the NaN is the largest, and the mask leaves it to the arithmetic to show it
    kept = run_kernel(kernel_of(lambda t: t.other * t.largest(t.other, 10), 1, None, (40_000,)), [values]).output
    assert (bool(kept[17].isnan()), float(kept[1700])) == (True, float("inf"))


def test_magnitudes_of_float64_are_compared_in_float32() -> None:
    """Elements that float32 does not distinguish are ties: the first of them are selected."""
    values = torch.ones(1000, dtype=torch.float64)
    values[500:] += 1e-12
    values[900] = 1 + 1e-6
    (mask,), _ = select(values, [Target(3)], 1 << 15)
    assert mask.nonzero().flatten().tolist() == [0, 1, 900]
    (mask,), _ = select(-values, [Target(3)], 1 << 15, sampled=False)
    assert mask.nonzero().flatten().tolist() == [0, 1, 900]


def test_a_threshold_selects_ties_up_to_its_block() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 2.0, 2.0, 1.0, 2.0, 2.0, 2.0, 5.0, float("nan"), 2.0])
    flags = torch.empty(12, dtype=torch.bool)
    for threshold, wanted in (
        (Threshold(2.0, 0, 0), [2, 9]),
        (Threshold(2.0, 1, 1), [1, 2, 3, 4, 9]),  # block 0, and the first tie of block 1
        (Threshold(2.0, 1, 2), [1, 2, 3, 4, 6, 9]),
        (Threshold(2.0, 2, 0), [1, 2, 3, 4, 6, 7, 9]),
        (Threshold(2.0, selection.TOP, 0), [1, 2, 3, 4, 6, 7, 8, 9, 11]),
        (selection.NONE, []),
    ):
        for step in (4, 8, 12):  # elements in a tile
            found = []
            for begin in range(0, 12, step):
                out = torch.empty(len(values[begin : begin + step]))
                counting.selected(out, values[begin : begin + step], threshold, begin, 4, flags)
                found += [begin + index for index in out.nonzero().flatten().tolist()]
            assert found == wanted


@settings(deadline=None, max_examples=examples(100))
@given(seed=st.integers(0, 1 << 30), size=st.integers(1, 700), levels=st.sampled_from([1, 3, 50, 1 << 31]))
def test_devices_count_what_numpy_counts(seed: int, size: int, levels: int) -> None:
    """For a bracket that is an estimate or certain, for one of a single value, and for a share."""
    generator = numpy.random.default_rng(seed)
    bits = torch.from_numpy(generator.integers(0, levels, size).astype(numpy.int32))
    low, guess, high = sorted(generator.integers(0, levels, 3).tolist())
    searches = [
        Search(7, low=low, high=high, guess=guess, above=None),
        Search(7, low=low, high=high, guess=guess, above=3),
        Search(7, low=guess, high=guess, guess=guess, above=3),
        Search(None, 0.3, low=low, high=high, guess=guess, above=None),
        Search(7),
    ]
    over, inside = torch.empty(size, dtype=torch.bool), torch.empty(size, dtype=torch.bool)
    for search in searches:
        for block in (BLOCK, 60):
            wanted = counting.count(search, bits, block, over, inside)
            assert isinstance(wanted, selection.Counts)
            tile = 3 * block
            parts = [counting.count_on_device(search, bits[i : i + tile], block) for i in range(0, size, tile)]
            found = counting.counts_of(search, parts)
            assert (found.inside is None) == (wanted.inside is None) == (search.low == search.high)
            if found.inside is not None and wanted.inside is not None:
                assert found.inside.tolist() == wanted.inside.tolist()
                assert len(found.inside) == search.bins
            for name in ("positive", "above", "above_guess", "equal"):
                assert getattr(found, name) == getattr(wanted, name)


@pytest.mark.parametrize("kind", ["normal", "rising", "repeating"])
def test_the_sample_brackets_the_target_closely(kind: str) -> None:
    size, rank = 1 << 20, 300_000
    noise = torch.rand(size, generator=torch.Generator().manual_seed(3)) * 1e-3
    stratum = size // selection._RUNS
    values = {
        "normal": torch.from_numpy(numpy.abs(numpy.random.default_rng(3).standard_normal(size)).astype(numpy.float32)),
        "rising": torch.arange(size) / size + noise,
        "repeating": torch.arange(size) % stratum / stratum + noise,  # as often as samples are taken
    }[kind]
    bits = values.view(torch.int32)
    tiles = [bits[start : start + (1 << 17)][sample_indices(size, start, 1 << 17)] for start in range(0, size, 1 << 17)]
    sample = torch.cat(tiles).sort(descending=True).values.numpy()
    assert selection._RUNS <= len(sample) == len(sample_indices(size, 0, size)) <= size / 8
    search = initial_bracket(Search(rank), sample, size)
    wanted = int(bits.sort(descending=True).values[rank - 1])
    assert search.low <= wanted <= search.high
    assert int(((bits >= search.low) & (bits <= search.high)).sum()) < size / 25
