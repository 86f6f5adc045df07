"""The random masks of dare and della, computed from their definition with numpy's integers."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GOLDEN, STEP = 0x9E3779B97F4A7C15, 0x9E3779B1
BITS = 1 << 32

Words = NDArray[np.uint64]


def key_of(seed: int, name: str) -> int:
    """The key of an output tensor."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")


def splitmix(x: int) -> int:
    """The splitmix64 hash of a 64-bit number."""
    x = (x + GOLDEN) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def hashes(key: int, position: int, count: int) -> Words:
    """The 32-bit hashes of the indices from 0 to `count` - 1: lowbias32, with a number added between its rounds."""
    stream = splitmix(splitmix(splitmix(key) + position))
    limit = np.uint64(BITS)
    x = (np.arange(count, dtype=np.uint64) * np.uint64(STEP) + np.uint64(stream % BITS)) % limit
    x = ((x ^ x >> np.uint64(16)) * np.uint64(0x7FEB352D) + np.uint64(stream >> 32)) % limit
    x = (x ^ x >> np.uint64(15)) * np.uint64(0x846CA68B) % limit
    return x ^ x >> np.uint64(16)


def uniform(key: int, position: int, count: int) -> NDArray[np.float32]:
    """The random numbers of the first `count` elements: the highest 24 bits of their hashes, as fractions."""
    return ((hashes(key, position, count) >> np.uint64(8)).astype(np.float32) / np.float32(1 << 24)).astype(np.float32)


def dare(shape: tuple[int, ...], density: float, *, key: int, position: int) -> Tensor:
    """The mask of dare: 1 for a kept element, else 0."""
    kept = uniform(key, position, int(np.prod(shape, dtype=np.int64))) < np.float32(density)
    return torch.from_numpy((kept if density < 1 else np.ones_like(kept)).astype(np.float64)).view(shape)


def della(delta: Tensor, density: float, epsilon: float, *, key: int, position: int) -> Tensor:
    """The mask of della: the probability rises with the rank of an element's magnitude in its row."""
    if density in (0, 1):
        return torch.full_like(delta, float(density))
    # a vector is one row, and magnitudes are compared in float32
    rows = delta.abs().to(torch.float32).reshape(-1, delta.shape[-1] if delta.dim() else 1)
    last = rows.shape[1] - 1
    order = torch.argsort(rows, dim=1, stable=True)
    slope, lowest = (2 * epsilon / last, density - epsilon) if last else (0.0, density)
    shares = np.arange(last + 1, dtype=np.float32) * np.float32(slope) + np.float32(lowest)
    limits = torch.empty_like(rows).scatter_(1, order, torch.from_numpy(shares).expand_as(order))
    numbers = torch.from_numpy(uniform(key, position, rows.numel())).view(rows.shape)
    return (numbers < limits).to(torch.float64).view(delta.shape)
