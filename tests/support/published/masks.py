"""The random masks of dare and della, computed from their definition with numpy's integers."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GOLDEN, STEP = 0x9E3779B97F4A7C15, 0x9E3779B1
BLOCK, WIDTH = 1 << 15, 1 << 10
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


def bound(probability: float) -> int:
    """The unsigned hash below which an element with this probability is kept."""
    return min(max(round(probability * BITS), 1), BITS - 1)


def dare(shape: tuple[int, ...], density: float, *, key: int, position: int) -> Tensor:
    """The mask of dare: 1 for a kept element, else 0."""
    size = int(np.prod(shape, dtype=np.int64))
    if density in (0, 1):
        return torch.full(shape, float(density), dtype=torch.float64)
    limit = bound(density)
    rare = limit < BITS // 2  # the others are dropped with the opposite probability
    limit = limit if rare else BITS - limit
    words = hashes(key, position, (size + 3) // 4).astype("<u4")
    signed = words.view(np.int8)[:size].astype(np.int64)  # a hash has four bytes, one for each of four elements
    blocks = np.arange(-(-size // BLOCK), dtype=np.uint64)
    mixed = (blocks * np.uint64(GOLDEN) + np.uint64(splitmix(splitmix(splitmix(key ^ position))))) * np.uint64(GOLDEN)
    offsets = ((mixed >> np.uint64(40)) % np.uint64(WIDTH)).astype(np.int64)
    more = (mixed < np.uint64((limit % (1 << 14)) << 50)).astype(np.int64)
    reversed_bits = np.array([int(f"{column:010b}"[::-1], 2) for column in range(WIDTH)])
    elements = np.arange(size)
    block = elements // BLOCK
    columns = (elements + offsets[block]) % WIDTH
    raised = reversed_bits[columns] < limit % (1 << 24) // (1 << 14) + more[block]
    below = signed < (limit >> 24) - 128 + raised
    return torch.from_numpy((below if rare else ~below).astype(np.float64)).view(shape)


def della(delta: Tensor, density: float, epsilon: float, *, key: int, position: int) -> Tensor:
    """The mask of della: the probability rises with the rank of an element's magnitude in its row."""
    if density in (0, 1):
        return torch.full_like(delta, float(density))
    # a vector is one row, and magnitudes are compared in float32
    rows = delta.abs().to(torch.float32).reshape(-1, delta.shape[-1] if delta.dim() else 1)
    last = rows.shape[1] - 1
    order = torch.argsort(rows, dim=1, stable=True)
    shares = [density + (2 * epsilon * rank / last - epsilon if last else 0.0) for rank in range(last + 1)]
    bounds = torch.tensor([bound(share) for share in shares], dtype=torch.int64).expand_as(order)
    limits = torch.empty_like(order).scatter_(1, order, bounds)
    numbers = torch.from_numpy(hashes(key, position, rows.numel()).astype(np.int64)).view(rows.shape)
    signed = (numbers + BITS // 2) % BITS  # hashes are compared as signed numbers
    return (signed < limits).to(torch.float64).view(delta.shape)
