"""Random masks: the right rates, independent of one another, and a pure function of key, model and element."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mergeloom.methods.kernel import hashing, mask_ops
from mergeloom.methods.kernel.spec import BLOCK
from mergeloom.methods.kernel.torch_backend.tile import Workspace
from tests.support.methods.kernels import merge

SIZE = 1_000_000
SIGMAS = 4.0


def mask(density: float, *, key: int = 1, position: int = 1, size: int = SIZE) -> Tensor:
    """What dare keeps of a model: 1 or 0."""
    parameters = {"weight": (0.0, 1.0), "density": (0.0, density), "rescale": False}
    return merge(
        "dare_linear", [torch.zeros(size), torch.ones(size)], parameters, base=0, key=key, positions=(0, position)
    )


def assert_share(found: float, number: int, share: float) -> None:
    """`found` of so many independent draws is what a chance of `share` gives."""
    sigma = math.sqrt(number * share * (1 - share))
    assert abs(found - number * share) <= SIGMAS * sigma


@pytest.mark.parametrize("density", [1e-4, 0.01, 0.3, 0.5, 0.53, 0.9, 0.999])
def test_rate(density: float) -> None:
    assert_share(float(mask(density).sum()), SIZE, density)


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_masks_are_independent(density: float) -> None:
    first = mask(density)
    both = density * density
    others = [
        mask(density, position=2),
        mask(density, key=2),
        mask(density, key=1 << 40),
        mask(density, position=1 << 20),
    ]
    for other in others:
        assert_share(float((first * other).sum()), SIZE, both)
    for lag in (1, 2, 3, 16, 511, 1024, BLOCK - 1, BLOCK):
        pairs = first[:-lag] * first[lag:]
        # neighbouring pairs share an element, which makes the spread wider
        spread = math.sqrt(len(pairs) * (both + 2 * density**3 - 3 * both * both))
        assert abs(float(pairs.sum()) - len(pairs) * both) <= SIGMAS * spread


def test_runs_of_eight_are_even() -> None:
    """Each of the 256 patterns of eight neighbours comes equally often."""
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.float32)
    patterns = (mask(0.5).view(-1, 8) * weights).sum(1).long()
    counts = torch.bincount(patterns, minlength=256).double()
    even = SIZE / 8 / 256
    chi = float(((counts - even) ** 2 / even).sum())
    assert abs(chi - 255) <= SIGMAS * math.sqrt(2 * 255)


def test_extremes() -> None:
    assert float(mask(0.0).sum()) == 0
    assert float(mask(1.0).sum()) == SIZE
    assert float(mask(1e-12).sum()) == 0
    assert float(mask(1 - 1e-12).sum()) >= SIZE - 1


def test_small_densities_hold_on_average() -> None:
    """The last bits of a bound are drawn per block: the mean over many blocks is exact."""
    size, density = 64 * BLOCK, 3e-6
    found = sum(float(mask(density, key=key, size=size).sum()) for key in range(40))
    expected = 40 * size * density
    assert abs(found - expected) <= SIGMAS * math.sqrt(2 * expected)


def test_mean_over_seeds_approaches_task_arithmetic() -> None:
    seeds, density = 200, 0.3
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.zeros(SIZE), torch.randn(SIZE, generator=generator) * 1e-3]
    wanted = merge("task_arithmetic", inputs, {"weight": (0.0, 1.0)}, base=0)
    parameters = {"weight": (0.0, 1.0), "density": (0.0, density)}
    mean = torch.zeros(SIZE, dtype=torch.float64)
    for seed in range(seeds):
        mean += merge("dare_linear", inputs, parameters, base=0, key=seed).double() / seeds
    delta = wanted.double()
    # each element is delta / density with the chance density, so its mean has this standard deviation
    sigma = delta.abs() * math.sqrt((1 - density) / density / seeds)
    scores = (mean - delta) / sigma.clamp(min=1e-30)
    assert abs(float(scores.mean())) <= SIGMAS / math.sqrt(SIZE)
    assert abs(float((scores**2).mean()) - 1) <= SIGMAS * math.sqrt(2.2 / SIZE)
    slope = float((mean * delta).sum() / (delta * delta).sum())
    spread = math.sqrt(float((sigma * delta).square().sum())) / float((delta * delta).sum())
    assert abs(slope - 1) <= SIGMAS * spread


def test_della_keeps_by_rank() -> None:
    rows, columns, density, epsilon = 500, 2000, 0.4, 0.3
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(rows, columns, generator=generator)
    parameters = {"weight": (0.0, 1.0), "density": (0.0, density), "epsilon": (0.0, epsilon), "rescale": False}
    output = merge("della_linear", [torch.zeros_like(delta), delta], parameters, base=0, key=5)
    kept = (output != 0).float()
    ordered = kept.gather(1, torch.argsort(delta.abs(), dim=1))
    for tenth in range(10):
        part = ordered[:, tenth * 200 : (tenth + 1) * 200]
        share = density - epsilon + 2 * epsilon * (tenth * 200 + 99.5) / (columns - 1)
        assert_share(float(part.sum()), part.numel(), share)


@pytest.mark.parametrize("element", [0, 2**31 - 5, 2**32 - 1000, 2**33 + 7, 2**40])
def test_hash_beyond_32_bits(element: int) -> None:
    """Against the same arithmetic on Python's numbers, one element at a time."""
    size = 3001
    found = hashing.hashes(99, 3, element, torch.empty(size, dtype=torch.int32), torch.empty(size, dtype=torch.int32))
    limit = 1 << 32
    for i in (0, 1, 4, 5, 6, 999, 1000, 1001, 1023, 1024, 3000):
        period, low = divmod(element + i, limit)
        stream = hashing.mix(hashing.mix(hashing.mix(99) + 3) + period)
        x = (low * 0x9E3779B1 + stream) % limit
        x = (x ^ x >> 16) * 0x7FEB352D + (stream >> 32)
        x = (x % limit ^ x % limit >> 15) * 0x846CA68B % limit
        x ^= x >> 16
        assert int(found[i]) == (x + limit // 2) % limit - limit // 2


def test_masks_beyond_32_bits_do_not_repeat() -> None:
    size = 1 << 16

    def at(element: int) -> Tensor:
        workspace = Workspace(torch.empty(8 * size, dtype=torch.uint8), torch.float32)
        values = torch.ones(size)
        masks = hashing.masks(7, 0, element, size, hashing.threshold(0.5), 1.0, values.device)
        return mask_ops.apply_mask(values, masks, hashing.scratch(size, workspace))

    first = at(0)
    for element in (1 << 32, 1 << 33, 1 << 34):
        assert_share(float((first * at(element)).sum()), size, 0.25)
    for element in (1 << 33, 1 << 34):  # four elements share a hash: 2^32 hashes end at element 2^34
        crossing = at(element - BLOCK)
        assert torch.equal(crossing[BLOCK:], at(element)[: size - BLOCK])
