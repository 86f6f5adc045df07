"""Random masks that are a pure function of key, model and element: the same for any tile, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .contract import BLOCK
from .lazy import numpy as np
from .lazy import torch
from .lazy_ops import mask_ops

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    from .tile import Workspace

_PERIOD = 1 << 32  # of the low half of an index
_GOLDEN = 0x9E3779B97F4A7C15
_STEP = 0x9E3779B1  # odd, so that the index times it runs through all 32-bit numbers
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B  # of C. Wellons' lowbias32, whose rounds these are
_WIDTH = 1 << 10


def threshold(chance: float) -> int:
    """The bound that a hash lies below with this chance, within 2^-33; inside (0, 1) neither never nor always."""
    if chance <= 0:
        return -(1 << 31)
    return min(max(round(chance * _PERIOD), 1), _PERIOD - 1) - (1 << 31)


def probability(bound: int) -> float:
    """How probable it is that a hash lies below the bound."""
    return (bound + (1 << 31)) / _PERIOD


def masks(
    key: int, position: int, element: int, size: int, bound: int, factor: float, device: torch.device
) -> list[mask_ops.Mask]:
    """For `mask_ops.apply_mask`: what keeps each value with its own chance, times a factor.

    One hash serves four neighbours: each of its bytes is compared with the bound's highest byte. What that leaves of
    the chance is made up by a bound that is one higher in some columns of each row of 2^10: evenly spread ones, as many
    as the bound's next 10 bits say, and one more in some blocks, from a place on that is random for each block. So
    every element is kept with exactly the probability of the bound.

    Args:
        key: the output tensor's, 64 bits.
        position: of the input's model in the recipe.
        element: the index of the first value, a multiple of `BLOCK`.
        size: how many values.
        bound: of `threshold`.
        factor: what is kept is multiplied by it.
        device: that the values are on.
    """
    rare = bound < 0  # of a likely event the opposite is compared, so that bounds stay clear of a byte's ends
    bounds = _bounds(key, position, bound if rare else -bound, element // BLOCK, -(-size // BLOCK), device)
    return [
        mask_ops.Mask(
            4 * part.start,
            min(4 * part.stop, size),
            stream,
            bounds[4 * part.start // BLOCK :],
            not rare,
            BLOCK,
            factor,
        )
        for part, stream in _streams(key, position, element // 4, (size + 3) // 4, device)
    ]


def scratch(size: int, workspace: Workspace) -> mask_ops.Scratch:
    """Workspace for `mask_ops.apply_mask` of so many values: 7/4 float32 for each."""
    hash_words = (size + 3) // 4
    mark = workspace.mark()
    hashed = workspace.take(hash_words, torch.int32)
    workspace.release(mark)
    return mask_ops.Scratch(
        hashed,
        workspace.take(4 * hash_words, torch.int8),  # the same memory
        workspace.take(hash_words, torch.int32),
        workspace.take(size, torch.int8),
        workspace.take(size, torch.float32),
    )


def _bounds(key: int, position: int, bound: int, first: int, count: int, device: torch.device) -> Tensor:
    """What the bytes must lie below in each of `count` blocks from the block `first` on: int8, (count, _WIDTH)."""
    golden, stream = np.uint64(_GOLDEN), np.uint64(_stream(key ^ position, 0, 0))
    numbers = np.arange(first, first + count, dtype=np.uint64)
    numbers *= golden
    numbers += stream
    numbers *= golden
    more = numbers < np.uint64(bound % (1 << 14) << 50)
    numbers >>= np.uint64(40)
    numbers %= np.uint64(_WIDTH)
    bounds = torch.from_numpy(_patterns(bound)[more.view(np.int8), numbers.view(np.int64)])
    return bounds if device.type == "cpu" else bounds.to(device)


@lru_cache(maxsize=16)
def _patterns(bound: int) -> numpy.ndarray[Any, Any]:
    """The rows of bounds with the lower and the higher number of ones that are one more: from each place on, int8,
    (2, _WIDTH, _WIDTH), of which a row is stored twice."""
    places, ranks = np.arange(_WIDTH), np.zeros(_WIDTH, dtype=np.int64)
    for bit in range(_WIDTH.bit_length() - 1):  # in reverse order, so that any first ones are evenly spread
        ranks = ranks * 2 + (places >> bit) % 2
    chance = bound + (1 << 31)
    number = chance % (1 << 24) >> 14
    rows = np.stack([(chance >> 24) - 128 + (ranks < number + more) for more in (0, 1)]).astype(np.int8)
    return np.lib.stride_tricks.sliding_window_view(np.tile(rows, 2), _WIDTH, axis=1)


def hashes(key: int, position: int, element: int, out: Tensor, scratch: Tensor) -> Tensor:
    """A hash of the index of each element, evenly spread over -2^31 to 2^31 - 1.

    Args:
        key: the output tensor's, 64 bits.
        position: of the input's model in the recipe.
        element: the index of the first element.
        out: flat int32, one for each element.
        scratch: as large as `out`.
    """
    for part, stream in _streams(key, position, element, out.numel(), out.device):
        mask_ops.hashed(out[part], scratch[part], stream)
    return out


def _streams(
    key: int, position: int, first: int, count: int, device: torch.device
) -> Iterator[tuple[slice, mask_ops.Stream]]:
    """The parts of a range of indices, mostly one, that have the same high half, each with its stream of hashes."""
    done = 0
    while done < count:
        period, low = divmod(first + done, _PERIOD)
        size = min(count - done, _PERIOD - low)
        stream = _stream(key, position, period)
        start, rows = low * _STEP + stream, max(1 << (size // _WIDTH).bit_length(), _WIDTH)
        yield (
            slice(done, done + size),
            mask_ops.Stream(
                _steps(_WIDTH, _STEP, device),
                _steps(rows, _WIDTH * _STEP, device),
                _signed(start),
                _signed(start + size // _WIDTH * _WIDTH * _STEP),
                _signed(_FIRST),
                _signed(stream >> 32),
                _signed(_SECOND),
            ),
        )
        done += size


@lru_cache(maxsize=256)
def _stream(key: int, position: int, period: int) -> int:
    return mix(mix(mix(key) + position) + period)


def mix(x: int) -> int:
    """splitmix64: a 64-bit number well mixed."""
    x = (x + _GOLDEN) % (1 << 64)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return x ^ (x >> 31)


@lru_cache(maxsize=16)
def _steps(number: int, step: int, device: torch.device) -> Tensor:
    """The first multiples of a number modulo 2^32: a few KiB."""
    return torch.arange(number, dtype=torch.int64, device=device).mul_(step % _PERIOD).to(torch.int32)


def _signed(x: int) -> int:
    """The int32 with the bits of x modulo 2^32."""
    return (x + (1 << 31)) % _PERIOD - (1 << 31)
