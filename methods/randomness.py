"""Random masks that are a pure function of key, model and element: the same for any tile, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import numpy as np
from .lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_STEP = 0x9E3779B1  # odd, so that index times it runs through all 32-bit numbers
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B  # C. Wellons' lowbias32, whose two rounds these are
_WIDTH = 1 << 10
_PERIOD = 1 << 32  # elements after which the low half of an index begins anew


def threshold(probability: float) -> int:
    """The bound that a hash lies below with this probability, within 2^-33; between 0 and 1 it is never 0 or 1 itself."""
    if probability <= 0:
        return -(1 << 31)
    return min(max(round(probability * _PERIOD), 1), _PERIOD - 1) - (1 << 31)


def probability(bound: int) -> float:
    """How probable it is that a hash lies below the bound."""
    return (bound + (1 << 31)) / _PERIOD


def hashes(key: int, position: int, element: int, out: Tensor, scratch: Tensor) -> Tensor:
    """A hash of the index of each element, evenly spread over -2^31 to 2^31 - 1.

    Args:
        key: the output tensor's, 64 bits.
        position: of the input's model in the recipe.
        element: the index of the first element.
        out: flat int32, one for each element.
        scratch: as large as `out`.
    """
    done = 0
    while done < out.numel():
        period, low = divmod(element + done, _PERIOD)
        size = min(out.numel() - done, _PERIOD - low)
        stream = mix(mix(mix(key) + position) + period)
        part, spare = out[done : done + size], scratch[done : done + size]
        _count(part, low * _STEP + stream)
        _xor_shifted(part, 16, spare).mul_(_signed(_FIRST)).add_(_signed(stream >> 32))
        _xor_shifted(part, 15, spare).mul_(_signed(_SECOND))
        done += size
    return out


def _count(out: Tensor, first: int) -> None:
    """``first + i * _STEP`` for each place i, modulo 2^32."""
    size, whole = out.numel(), out.numel() // _WIDTH
    places = torch.arange(max(whole, _WIDTH), dtype=torch.int64, device=out.device)
    columns = (places[:_WIDTH] * _STEP + first % _PERIOD).to(torch.int32)
    rows = (places[:whole, None] * (_WIDTH * _STEP % _PERIOD)).to(torch.int32)
    torch.add(rows, columns, out=out[: whole * _WIDTH].view(-1, _WIDTH))
    if rest := size - whole * _WIDTH:
        torch.add(columns[:rest], _signed(whole * _WIDTH * _STEP), out=out[size - rest :])


def _xor_shifted(x: Tensor, bits: int, scratch: Tensor) -> Tensor:
    """``x ^ (x >> bits)`` in place, where zeros come in from the left."""
    if x.device.type == "cpu":
        np.right_shift(x.numpy().view(np.uint32), bits, out=scratch.numpy().view(np.uint32))
    else:
        torch.bitwise_right_shift(x, bits, out=scratch).bitwise_and_((1 << (32 - bits)) - 1)
    return x.bitwise_xor_(scratch)


def mix(x: int) -> int:
    """splitmix64: a 64-bit number well mixed."""
    x = (x + _GOLDEN) % (1 << 64)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The int32 with the bits of x modulo 2^32."""
    return (x + (1 << 31)) % _PERIOD - (1 << 31)
