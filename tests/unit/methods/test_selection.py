"""Selection of the k largest: exact for any sample, within the declared passes, ties broken by position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeloom.methods.kernel import selection
from mergeloom.methods.kernel.selection import Selection, Target
from mergeloom.methods.kernel.torch_backend.tile import Tile, Workspace

BLOCK = 64


def select(values: Tensor, targets: list[Target], tile: int, *, sampled: bool = True) -> tuple[list[Tensor], int]:
    """For each target the mask of its elements, and the number of passes that it took."""
    workspace = Workspace(torch.empty(1 << 20, dtype=torch.uint8), torch.float32)

    def streams(part: Tile) -> Iterator[Tensor]:
        yield part.inputs[0]

    def tiles() -> Iterator[Tile]:
        for start in range(0, len(values), tile):
            workspace.reset()
            yield Tile([values[start : start + tile]], workspace, element=start, key=0, positions=(0,))

    search = Selection(len(values), targets, streams, sampled=sampled)
    state: Any = None
    passes = 0
    for index in range(search.reductions):
        if state is not None and not search.needed(index, state):
            continue
        passes += 1
        merged = None
        for part in tiles():
            merged = search.merge(merged, search.reduce(index, part, state))
        state = search.finish(index, merged, state)
    masks = []
    for target in state.targets:
        assert target.threshold is not None
        parts = [target.threshold.mask(part.inputs[0], part.element, torch.empty(part.elements)) for part in tiles()]
        masks.append(torch.cat(parts))
    return masks, passes


def highest(values: Tensor, rank: int) -> Tensor:
    mask = torch.zeros(len(values))
    mask[torch.argsort(values, descending=True, stable=True)[:rank]] = 1
    return mask


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small blocks, of which a few hundred elements have many."""
    monkeypatch.setattr(selection, "BLOCK", BLOCK)


@pytest.mark.usefixtures("small")
@settings(deadline=None, max_examples=300)
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
        masks, passes = select(values, [Target(0, rank) for rank in ranks], tile * BLOCK)
    assert passes <= 5
    for mask, rank in zip(masks, ranks, strict=True):
        wanted = highest(values, rank)
        different = values[mask != wanted]
        assert not different.any()  # which zeros are in is of no account
        assert float(values[wanted > 0].min()) == 0 or not len(different)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 1.0])
@pytest.mark.parametrize("zeros", [0.0, 0.6, 1.0])
def test_share_of_what_is_above_zero(share: float, zeros: float) -> None:
    generator = numpy.random.default_rng(0)
    array = numpy.abs(generator.standard_normal(70_000)).astype(numpy.float32)
    array[generator.random(70_000) < zeros] = 0
    values = torch.from_numpy(array)
    (mask,), _ = select(values, [Target(0, None, share=share)], 10 * BLOCK)
    assert torch.equal(mask, highest(values, int(share * int((values > 0).sum()))))


def test_few_passes_where_values_have_few_bits() -> None:
    generator = numpy.random.default_rng(1)
    values = torch.from_numpy(numpy.abs(generator.standard_normal(300_000)).astype(numpy.float32))
    ranks = [Target(0, 100_000), Target(0, 3_000)]
    assert select(values.mul(8).round(), ranks[:1], 1 << 15)[1] == 2
    assert select(values, ranks, 1 << 15)[1] <= 4


def test_magnitudes_alone_take_two_passes() -> None:
    generator = numpy.random.default_rng(2)
    values = torch.from_numpy(numpy.abs(generator.standard_normal(100_000)).astype(numpy.float32))
    for exponent in (-30, 0, 30):
        _, passes = select(values * 2.0**exponent, [Target(0, 5, exact=False)], 1 << 15, sampled=False)
        assert passes == 2


def test_a_nan_is_no_number_but_no_trouble() -> None:
    values = torch.rand(40_000)
    values[17] = float("nan")
    values[1700] = float("inf")
    (mask,), _ = select(values, [Target(0, 10)], 1 << 15)
    assert mask.sum() == 9  # the NaN is the largest, and the mask leaves it to the arithmetic to show it


@pytest.mark.parametrize("kind", ["normal", "rising", "repeating"])
def test_the_sample_brackets_the_target_closely(kind: str) -> None:
    size, rank = 1 << 20, 300_000
    search = Selection(size, [Target(0, rank)], lambda tile: [tile.inputs[0]])
    assert 1 < search.stratum < size
    noise = torch.rand(size, generator=torch.Generator().manual_seed(3)) * 1e-3
    values = {
        "normal": torch.from_numpy(numpy.abs(numpy.random.default_rng(3).standard_normal(size)).astype(numpy.float32)),
        "rising": torch.arange(size) / size + noise,
        "repeating": torch.arange(size) % search.stratum / search.stratum + noise,  # as often as it is looked at
    }[kind]
    workspace = Workspace(torch.empty(1 << 24, dtype=torch.uint8), torch.float32)
    merged: Any = None
    for start in range(0, size, 1 << 17):
        workspace.reset()
        tile = Tile([values[start : start + (1 << 17)]], workspace, element=start, key=0, positions=(0,))
        merged = search.merge(merged, search.reduce(0, tile, None))
    (target,) = search.finish(0, merged, None).targets
    found = selection.bits(values)
    wanted = int(found.sort(descending=True).values[rank - 1])
    assert target.low <= wanted <= target.high
    assert int(((found >= target.low) & (found <= target.high)).sum()) < size / 25
