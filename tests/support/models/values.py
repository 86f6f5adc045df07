"""The values of test models: pure functions of seed, name and position, and their bytes in every dtype."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]
Fill = Callable[[str, int, int], Values]
"""``fill(name, start, count)``: the float32 values of `count` elements of a tensor, from element `start` on."""

CHUNK = 1 << 17  # elements that are made and written at once: they stay in the processor's cache
POOL = 1 << 22  # normal numbers that all random tensors take their values from

BITS = (
    dict.fromkeys(("BOOL", "U8", "I8", "F8_E8M0", "F8_E4M3", "F8_E5M2"), 8)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)
    | dict.fromkeys(("U32", "I32", "F32"), 32)
    | dict.fromkeys(("U64", "I64", "F64"), 64)
    | {"F4": 4}
)
"""Bits of one element, by the names that a header uses."""


@dataclass(frozen=True, slots=True)
class Random:
    """Normal values of mean 0; norm weights lie around 1. A pure function of seed, name and position."""

    seed: int
    scale: float = 0.02

    def __call__(self, name: str, start: int, count: int) -> Values:
        values = normal(f"{self.seed}:{name}", start, count) * np.float32(self.scale)
        if "norm" in name.lower() and name.endswith(".weight"):
            values += np.float32(1)
        return values


@dataclass(frozen=True, slots=True)
class FineTune:
    """A base model's values and a small normal task vector, added in float32 before the one rounding."""

    base: Fill
    seed: int
    scale: float = 0.002

    def __call__(self, name: str, start: int, count: int) -> Values:
        values = normal(f"task:{self.seed}:{name}", start, count) * np.float32(self.scale)
        values += self.base(name, start, count)
        return values


@cache
def _pool() -> Values:
    return np.random.default_rng(20240229).standard_normal(POOL + CHUNK, dtype=np.float32)


def normal(key: str, start: int, count: int) -> Values:
    """Normal numbers for elements of a tensor: each chunk is a slice of the pool, at a place that the key decides."""
    pieces = []
    while count:
        chunk, inside = divmod(start, CHUNK)
        take = min(count, CHUNK - inside)
        digest = hashlib.blake2b(f"{key}:{chunk}".encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "little") % POOL + inside
        pieces.append(_pool()[place : place + take])
        start, count = start + take, count - take
    if not pieces:
        return np.zeros(0, np.float32)
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def encode(values: Values, dtype: str) -> memoryview:
    """float32 values as the bytes of an element type, each rounded once, to nearest, ties to even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits >> np.uint32(16)) & np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += bits
        rounded >>= np.uint32(16)
        return _bytes(rounded.astype(np.uint16))
    if dtype in ("F16", "F32", "F64"):
        return _bytes(values.astype(f"f{BITS[dtype] // 8}"))
    if dtype in ("F8_E4M3", "F8_E5M2"):
        import torch

        kind = torch.float8_e4m3fn if dtype == "F8_E4M3" else torch.float8_e5m2
        return _bytes(torch.from_numpy(np.array(values)).to(kind).view(torch.uint8).numpy())
    if dtype == "BOOL":
        return _bytes(values > 0)
    kinds = {"U": "u", "I": "i"}
    return _bytes(np.rint(np.abs(values) * 100).astype(f"{kinds[dtype[0]]}{BITS[dtype] // 8}"))


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
