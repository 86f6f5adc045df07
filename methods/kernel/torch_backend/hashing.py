"""Random numbers as a pure function of key, model and element, independent of tiles and devices."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_PERIOD = 1 << 32  # the range of the low half of an index
_GOLDEN = 0x9E3779B97F4A7C15
_STEP = 0x9E3779B1  # odd, so its multiples modulo 2^32 cover all 32-bit numbers
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B  # multipliers of C. Wellons' lowbias32
_WIDTH = 1 << 10


class _Stream(NamedTuple):
    """The parameters of the hashes of adjacent elements whose indices have the same high half."""

    part: slice
    start: int
    between: int


def hashes(key: int, position: int, element: int, out: Tensor, scratch: Tensor) -> Tensor:
    """Hash the index of each element to a number in -2^31 to 2^31 - 1.

    The hash of element i of model p is lowbias32(i * step + low half of s), with the high half of s added between the
    two rounds, where s is a splitmix64 hash of the key, p and the high half of i.

    Args:
        key: 64-bit key of the output tensor.
        position: position of the input's model in the recipe.
        element: index of the first element.
        out: hashes, flat int32.
        scratch: scratch buffer of the same size.
    """
    for stream in _streams(key, position, element, out.numel()):
        _hash(out[stream.part], scratch[stream.part], stream)
    return out


def _hash(out: Tensor, scratch: Tensor, stream: _Stream) -> None:
    size = out.numel()
    rows = size // _WIDTH
    columns = _steps(_WIDTH, _STEP, out.device)
    if rows:
        lines = _steps(max(1 << rows.bit_length(), _WIDTH), _WIDTH * _STEP, out.device)[:rows]
        first = columns + _signed(stream.start)
        torch.add(lines.unsqueeze(1), first, out=out[: rows * _WIDTH].view(rows, _WIDTH))
    if rest := size - rows * _WIDTH:
        torch.add(columns[:rest], _signed(stream.start + rows * _WIDTH * _STEP), out=out[rows * _WIDTH :])
    torch.bitwise_right_shift(out, 16, out=scratch).bitwise_and_(0xFFFF)  # as a logical shift
    out.bitwise_xor_(scratch).mul_(_signed(_FIRST)).add_(_signed(stream.between))
    torch.bitwise_right_shift(out, 15, out=scratch).bitwise_and_(0x1FFFF)
    out.bitwise_xor_(scratch).mul_(_signed(_SECOND))
    torch.bitwise_right_shift(out, 16, out=scratch).bitwise_and_(0xFFFF)
    out.bitwise_xor_(scratch)


def _streams(key: int, position: int, first: int, count: int) -> Iterator[_Stream]:
    """Split a range of indices by their high half, which usually gives one part."""
    done = 0
    while done < count:
        period, low = divmod(first + done, _PERIOD)
        size = min(count - done, _PERIOD - low)
        seed = _stream_seed(key, position, period)
        yield _Stream(slice(done, done + size), low * _STEP + seed, seed >> 32)
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


@lru_cache(maxsize=16)
def _steps(number: int, step: int, device: torch.device) -> Tensor:
    """The first `number` multiples of `step` modulo 2^32."""
    return torch.arange(number, dtype=torch.int64, device=device).mul_(step % _PERIOD).to(torch.int32)


def _signed(x: int) -> int:
    """The int32 with the same bits as x modulo 2^32."""
    return (x + (1 << 31)) % _PERIOD - (1 << 31)
