"""Random masks that are a pure function of key, model and element: the same for any tile, on any device."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from .contract import BLOCK
from .lazy import numpy as np
from .lazy import on_cpu, torch

if TYPE_CHECKING:
    from torch import Tensor

    from .tile import Workspace

_PERIOD = 1 << 32  # of the low half of an index
_GOLDEN = 0x9E3779B97F4A7C15
_STEP = 0x9E3779B1  # odd, so that the index times it runs through all 32-bit numbers
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B  # of C. Wellons' lowbias32, whose rounds these are
_WIDTH = 1 << 10
_WINDOW = 1 << 10  # blocks whose bounds are made at once


def threshold(chance: float) -> int:
    """The bound that a hash lies below with this chance, within 2^-33; inside (0, 1) neither never nor always."""
    if chance <= 0:
        return -(1 << 31)
    return min(max(round(chance * _PERIOD), 1), _PERIOD - 1) - (1 << 31)


def probability(bound: int) -> float:
    """How probable it is that a hash lies below the bound."""
    return (bound + (1 << 31)) / _PERIOD


def kept(key: int, position: int, element: int, bound: int, workspace: Workspace, out: Tensor) -> Tensor:
    """1 for each element that is kept, each by its own chance, else 0.

    One hash serves two neighbours: the halves of it are compared with the bound's high half. Its low half is the chance
    that the high half counts one more, for a whole block. So every element is kept with exactly the probability of
    the bound, if that is no more than 1 - 2^-16.

    Args:
        key: the output tensor's, 64 bits.
        position: of the input's model in the recipe.
        element: the index of the first element, a multiple of `BLOCK`.
        bound: of `threshold`.
        workspace: for one and a half int32 an element.
        out: flat float32, one for each element.
    """
    size, blocks = out.numel(), -(-out.numel() // BLOCK)
    pairs, scratch, flags = (workspace.take((size + 1) // 2, torch.int32) for _ in range(3))
    bounds = _bounds(key, position, bound, element // BLOCK, blocks, out.device)
    halves = _xor_shifted(hashes(key, position, element // 2, pairs, scratch), 16, scratch).view(torch.int16)
    mask = flags.view(torch.int16)
    whole = size // BLOCK
    for first, rows in ((0, whole), (whole, blocks - whole)):
        part = slice(first * BLOCK, first * BLOCK + rows * BLOCK if first < whole else size)
        if rows:
            torch.lt(halves[part].view(rows, -1), bounds[first : first + rows, None], out=mask[part].view(rows, -1))
    return out.copy_(mask[:size])


def _bounds(key: int, position: int, bound: int, first: int, count: int, device: torch.device) -> Tensor:
    """What the halves of a hash must lie below, for each of `count` blocks from the block `first` on: int16."""
    windows = range(first // _WINDOW, (first + count - 1) // _WINDOW + 1)
    parts = [_window_bounds(key, position, bound, window, device) for window in windows]
    found = parts[0] if len(parts) == 1 else torch.cat(parts)
    start = first - windows[0] * _WINDOW
    return found[start : start + count]


@lru_cache(maxsize=64)
def _window_bounds(key: int, position: int, bound: int, window: int, device: torch.device) -> Tensor:
    numbers = np.arange(window * _WINDOW, (window + 1) * _WINDOW, dtype=np.uint64) * np.uint64(_GOLDEN)
    numbers = (numbers + np.uint64(mix(mix(key) ^ position))) * np.uint64(_GOLDEN) >> np.uint64(48)
    high = np.minimum((bound >> 16) + (numbers < bound % (1 << 16)), (1 << 15) - 1).astype(np.int16)
    return torch.from_numpy(high).to(device)


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


def mix(x: int) -> int:
    """splitmix64: a 64-bit number well mixed."""
    x = (x + _GOLDEN) % (1 << 64)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return x ^ (x >> 31)


def _count(out: Tensor, first: int) -> None:
    """``first + i * _STEP`` for each place i, modulo 2^32."""
    size, whole = out.numel(), out.numel() // _WIDTH
    columns = _steps(_WIDTH, _STEP, out.device).add(_signed(first))
    if whole:
        rows = _steps(max(1 << (whole - 1).bit_length(), _WIDTH), _WIDTH * _STEP, out.device)
        torch.add(rows[:whole, None], columns, out=out[: whole * _WIDTH].view(-1, _WIDTH))
    if rest := size - whole * _WIDTH:
        torch.add(columns[:rest], _signed(whole * _WIDTH * _STEP), out=out[size - rest :])


@lru_cache(maxsize=16)
def _steps(number: int, step: int, device: torch.device) -> Tensor:
    """The first multiples of a number modulo 2^32: a few KiB."""
    return torch.arange(number, dtype=torch.int64, device=device).mul_(step % _PERIOD).to(torch.int32)


def _xor_shifted(x: Tensor, bits: int, scratch: Tensor) -> Tensor:
    """``x ^ (x >> bits)`` in place, where zeros come in from the left."""
    if on_cpu(x):
        np.right_shift(x.numpy().view(np.uint32), bits, out=scratch.numpy().view(np.uint32))
    else:
        torch.bitwise_right_shift(x, bits, out=scratch).bitwise_and_((1 << (32 - bits)) - 1)
    return x.bitwise_xor_(scratch)


def _signed(x: int) -> int:
    """The int32 with the bits of x modulo 2^32."""
    return (x + (1 << 31)) % _PERIOD - (1 << 31)
