"""Random masks: the right rates, independent of one another, and a pure function of key, model and element."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mergeloom.methods import Array, Inputs
from mergeloom.methods.kernel.random_streams import mix
from mergeloom.methods.kernel.spec import BLOCK
from mergeloom.methods.kernel.torch_backend import hashing
from mergeloom.methods.kernel.torch_backend.passes import Pass
from mergeloom.methods.kernel.torch_backend.tile import Tile, Workspace
from tests.support.methods.kernels import kernel_of, merge, run_kernel

SIZE = 1_000_000
SIGMAS = 4.0


def mask(density: float, *, key: int = 1, position: int = 1, size: int = SIZE) -> Tensor:
    """1 for each element of a model that dare keeps, else 0."""
    parameters = {"weight": (0.0, 1.0), "density": (0.0, density), "rescale": False}
    return merge(
        "dare_linear", [torch.zeros(size), torch.ones(size)], parameters, base=0, key=key, positions=(0, position)
    )


def assert_share(found: float, number: int, share: float) -> None:
    """The number of hits in independent draws agrees with their probability."""
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
    """Each of the 256 patterns of eight adjacent elements occurs equally often."""
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.float32)
    patterns = (mask(0.5).view(-1, 8) * weights).sum(1).long()
    counts = torch.bincount(patterns, minlength=256).double()
    even = SIZE / 8 / 256
    chi = float(((counts - even) ** 2 / even).sum())
    assert abs(chi - 255) <= SIGMAS * math.sqrt(2 * 255)


def test_extremes() -> None:
    assert float(mask(0.0).sum()) == 0
    assert float(mask(1.0).sum()) == SIZE
    assert float(mask(1e-12).sum()) <= 1  # as likely as the smallest random number: 2^-24
    assert float(mask(1 - 1e-12).sum()) >= SIZE - 1


def test_small_densities_hold_on_average() -> None:
    """A probability is rounded up to a multiple of 2^-24, which is 1.3% here: within the bounds of 84 million draws."""
    size, density = 64 * BLOCK, 3e-6
    found = sum(float(mask(density, key=key, size=size).sum()) for key in range(40))
    expected = 40 * size * density
    assert abs(found - expected) <= SIGMAS * math.sqrt(2 * expected)


def test_mean_over_seeds_approaches_task_arithmetic() -> None:
    seeds, density, size = 200, 0.3, 200_000
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.zeros(size), torch.randn(size, generator=generator) * 1e-3]
    wanted = merge("task_arithmetic", inputs, {"weight": (0.0, 1.0)}, base=0)
    parameters = {"weight": (0.0, 1.0), "density": (0.0, density)}
    mean = torch.zeros(size, dtype=torch.float64)
    for seed in range(seeds):
        mean += merge("dare_linear", inputs, parameters, base=0, key=seed).double() / seeds
    delta = wanted.double()
    # each element is delta / density with the chance density, so its mean has this standard deviation
    sigma = delta.abs() * math.sqrt((1 - density) / density / seeds)
    scores = (mean - delta) / sigma.clamp(min=1e-30)
    assert abs(float(scores.mean())) <= SIGMAS / math.sqrt(size)
    assert abs(float((scores**2).mean()) - 1) <= SIGMAS * math.sqrt(2.2 / size)
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


def lowbias(element: int, key: int, position: int) -> int:
    """The hash of an element from -2^31 on, with Python's numbers."""
    limit = 1 << 32
    period, low = divmod(element, limit)
    stream = mix(mix(mix(key) + position) + period)
    x = (low * 0x9E3779B1 + stream) % limit
    x = (x ^ x >> 16) * 0x7FEB352D + (stream >> 32)
    x = (x % limit ^ x % limit >> 15) * 0x846CA68B % limit
    x ^= x >> 16
    return (x + limit // 2) % limit - limit // 2


@pytest.mark.parametrize("element", [0, 2**31 - 5, 2**32 - 1000, 2**33 + 7, 2**40])
def test_hash_beyond_32_bits(element: int) -> None:
    """Against the same arithmetic on Python's numbers, one element at a time."""
    size = 3001
    found = hashing.hashes(99, 3, element, torch.empty(size, dtype=torch.int32), torch.empty(size, dtype=torch.int32))
    for i in (0, 1, 4, 5, 6, 999, 1000, 1001, 1023, 1024, 3000):
        assert int(found[i]) == lowbias(element + i, 99, 3)


def drawn_at(element: int, size: int, *, key: int = 7, position: int = 0) -> Tensor:
    """The random numbers of a range of elements of one tensor."""
    kernel = kernel_of(lambda t: t.uniform(t.other), 1, None, (1 << 50,))
    workspace = Workspace(torch.empty(kernel.workspace(size, 4), dtype=torch.uint8), torch.float32)
    tile = Tile([torch.zeros(size)], workspace, element=element, key=key, positions=(position,))
    return Pass(kernel, None, None, workspace).combine(tile).clone()


def test_random_numbers_are_the_upper_24_bits_of_the_hashes() -> None:
    found = drawn_at(2**32 - 500, 1000, key=99, position=3)
    for i in (0, 1, 2, 3, 498, 499, 500, 501, 999):
        assert float(found[i]) == (lowbias(2**32 - 500 + i, 99, 3) % (1 << 32) >> 8) / (1 << 24)
    many = drawn_at(0, SIZE)
    assert 0 <= float(many.min()) < 1e-4
    assert 1 - 1e-4 < float(many.max()) < 1


def test_masks_beyond_32_bits_do_not_repeat() -> None:
    size = 1 << 16
    first = (drawn_at(0, size) < 0.5).double()
    for element in (1 << 32, 1 << 33, 1 << 34):
        assert_share(float((first * (drawn_at(element, size) < 0.5)).sum()), size, 0.25)
        crossing = drawn_at(element - BLOCK, size)
        assert torch.equal(crossing[BLOCK:], drawn_at(element, size)[: size - BLOCK])


def test_masks_multiply_the_differences() -> None:
    """One mask per model of its own, whatever the dtypes of the inputs; factors 0 and 1 are exact."""
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(3001, generator=generator).to(dtype) for dtype in (torch.float32, torch.bfloat16)] * 2
    masks = [drawn_at(0, 3001, position=index) < 0.3 for index in range(4)]

    def method(t: Inputs) -> Array:
        return (t.models[1] - t.base) * (t.uniform(t.models[1]) < 0.3) + (t.models[2] - t.base)

    found = run_kernel(kernel_of(method, 4, 0, (3001,)), inputs, key=7).output
    x = [each.float() for each in inputs]
    assert torch.equal(found, torch.where(masks[2], x[2] - x[0], 0.0) + (x[3] - x[0]))
    parameters = {"weight": (0.0, 1.0, 1.0, 1.0), "density": (0.0, 0.3, 0.3, 1.0), "rescale": False}
    merged = merge("dare_linear", inputs, parameters, base=0, key=7)
    wanted = sum(torch.where(mask, each - x[0], 0.0) for mask, each in zip(masks[1:3], x[1:3], strict=True))
    assert torch.equal(merged, x[0] + (wanted + (x[3] - x[0])))
