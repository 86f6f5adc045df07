"""The keys of random numbers: a pure function of the output tensor, the model and the element.

The hash of element i of model p is lowbias32(i * STEP + low half of s), with the high half of s added between the two
rounds, where s is a splitmix64 hash of the tensor's key, p and the high half of i. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

PERIOD = 1 << 32
"""Number of elements whose indices have the same high half."""
STEP = 0x9E3779B1
"""Odd, so its multiples modulo 2^32 cover all 32-bit numbers."""
FIRST, SECOND = 0x7FEB352D, 0x846CA68B
"""The multipliers of C. Wellons' lowbias32."""
_GOLDEN = 0x9E3779B97F4A7C15


class Stream(NamedTuple):
    """The parameters of the hashes of adjacent elements whose indices have the same high half.

    Args:
        part: the elements, counted from the first one of the range.
        start: hash input of the first element, before it is reduced modulo 2^32.
        between: number that is added between the rounds.
    """

    part: slice
    start: int
    between: int


def streams(key: int, position: int, first: int, count: int) -> Iterator[Stream]:
    """Split a range of indices by their high half, which usually gives one part.

    Args:
        key: 64-bit key of the output tensor.
        position: position of the input's model in the recipe.
        first: index of the first element.
        count: number of elements.
    """
    done = 0
    while done < count:
        period, low = divmod(first + done, PERIOD)
        size = min(count - done, PERIOD - low)
        seed = _stream_seed(key, position, period)
        yield Stream(slice(done, done + size), low * STEP + seed, seed >> 32)
        done += size


@lru_cache(maxsize=256)
def _stream_seed(key: int, position: int, period: int) -> int:
    return mix(mix(mix(key) + position) + period)


def mix(x: int) -> int:
    """The splitmix64 hash of a 64-bit number."""
    x = (x + _GOLDEN) % (1 << 64)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return x ^ (x >> 31)
