"""Random masks as a pure function of key, model and element, independent of tiles and devices."""

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

_PERIOD = 1 << 32  # the range of the low half of an index
_GOLDEN = 0x9E3779B97F4A7C15
_STEP = 0x9E3779B1  # odd, so its multiples modulo 2^32 cover all 32-bit numbers
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B  # multipliers of C. Wellons' lowbias32
_WIDTH = 1 << 10


def threshold(keep_probability: float) -> int:
    """The bound that a hash is below with the given probability, exact to 2^-33; never 0 or 1 for one in (0, 1)."""
    if keep_probability <= 0:
        return -(1 << 31)
    return min(max(round(keep_probability * _PERIOD), 1), _PERIOD - 1) - (1 << 31)


def probability(bound: int) -> float:
    """The probability that a hash is below the bound."""
    return (bound + (1 << 31)) / _PERIOD


def masks(
    key: int, position: int, element: int, size: int, bound: int, factor: float, device: torch.device
) -> list[mask_ops.Mask]:
    """The random masks of a range of values, for `mask_ops.apply_mask`.

    One hash is used for four adjacent values: each of its bytes is compared with the highest byte of the bound. The
    lower bits of the bound add 1 to the byte in some columns of each row of 2^10 columns. Their number is given by the
    next 10 bits, plus 1 in some blocks; they are evenly spread from an offset that is random for each block. So each
    value is kept with exactly the probability of the bound.

    Args:
        key: 64-bit key of the output tensor.
        position: position of the input's model in the recipe.
        element: index of the first value, a multiple of `BLOCK`.
        size: number of values.
        bound: bound from `threshold`.
        factor: factor of the kept values.
        device: device of the values.
    """
    rare = bound < 0  # likely events use the opposite comparison, which keeps the bounds away from the limits of int8
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
        for part, stream in _hash_streams(key, position, element // 4, (size + 3) // 4, device)
    ]


def scratch(size: int, workspace: Workspace) -> mask_ops.Scratch:
    """Scratch buffers of `mask_ops.apply_mask` for `size` values: 7 bytes per value."""
    hash_words = (size + 3) // 4
    mark = workspace.mark()
    hashed = workspace.take(hash_words, torch.int32)
    workspace.release(mark)
    return mask_ops.Scratch(
        hashed,
        workspace.take(4 * hash_words, torch.int8),  # shares the memory of `hashed`
        workspace.take(hash_words, torch.int32),
        workspace.take(size, torch.int8),
        workspace.take(size, torch.float32),
    )


def _bounds(key: int, position: int, bound: int, first: int, count: int, device: torch.device) -> Tensor:
    """The bounds of the hash bytes in `count` blocks, starting with block `first`: int8, shape (count, _WIDTH)."""
    golden, stream = np.uint64(_GOLDEN), np.uint64(_stream_seed(key ^ position, 0, 0))
    numbers = np.arange(first, first + count, dtype=np.uint64)
    numbers *= golden
    numbers += stream
    numbers *= golden
    rounded_up = numbers < np.uint64(bound % (1 << 14) << 50)
    numbers >>= np.uint64(40)
    numbers %= np.uint64(_WIDTH)
    bounds = torch.from_numpy(_patterns(bound)[rounded_up.view(np.int8), numbers.view(np.int64)])
    return bounds if device.type == "cpu" else bounds.to(device)


@lru_cache(maxsize=16)
def _patterns(bound: int) -> numpy.ndarray[Any, Any]:
    """All rotations of a row of bounds: int8, shape (2, _WIDTH, _WIDTH), for the lower and higher number of increments.

    The rotations are views of one row that is stored twice.
    """
    columns, ranks = np.arange(_WIDTH), np.zeros(_WIDTH, dtype=np.int64)
    for bit in range(_WIDTH.bit_length() - 1):  # bit reversal: the first n are evenly spread for any n
        ranks = ranks * 2 + (columns >> bit) % 2
    unsigned = bound + (1 << 31)
    number = unsigned % (1 << 24) >> 14
    rows = np.stack([(unsigned >> 24) - 128 + (ranks < number + more) for more in (0, 1)]).astype(np.int8)
    return np.lib.stride_tricks.sliding_window_view(np.tile(rows, 2), _WIDTH, axis=1)


def hashes(key: int, position: int, element: int, out: Tensor, scratch: Tensor) -> Tensor:
    """Hash the index of each element to a number in -2^31 to 2^31 - 1.

    Args:
        key: 64-bit key of the output tensor.
        position: position of the input's model in the recipe.
        element: index of the first element.
        out: hashes, flat int32.
        scratch: scratch buffer of the same size.
    """
    for part, stream in _hash_streams(key, position, element, out.numel(), out.device):
        mask_ops.hash_indices(out[part], scratch[part], stream)
    return out


def _hash_streams(
    key: int, position: int, first: int, count: int, device: torch.device
) -> Iterator[tuple[slice, mask_ops.HashStream]]:
    """Split a range of indices by their high half, which usually gives one part, with the hash parameters of each."""
    done = 0
    while done < count:
        period, low = divmod(first + done, _PERIOD)
        size = min(count - done, _PERIOD - low)
        stream = _stream_seed(key, position, period)
        start, rows = low * _STEP + stream, max(1 << (size // _WIDTH).bit_length(), _WIDTH)
        yield (
            slice(done, done + size),
            mask_ops.HashStream(
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
