"""What a pass of a selection counts in a tile: on the CPU with numpy, elsewhere without waiting for the device.

On the CPU the few elements in the bracket are gathered first. On a device the number of them isn't known without
waiting, so all elements go into the histogram, those outside the bracket into a bin of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..reduction.selection import Counts, Search, Threshold

_GATHER_PARTS = 1 << 3  # a tile is gathered in parts if more than this fraction (1/8) of its elements is selected
_ROW_FLAGS = 1 << 7  # flags whose sum fits in a byte


def selected(out: Tensor, magnitudes: Tensor, threshold: Threshold, element: int, block: int, flags: Tensor) -> None:
    """Set `out` to 1 (true) for the selected elements of a tile, and to 0 for others and NaN.

    Args:
        out: mask, flat, of any dtype.
        magnitudes: magnitudes of the tile, flat float32.
        threshold: threshold.
        element: index of the tile's first element, a multiple of `block`.
        block: number of elements in a block.
        flags: scratch buffer, flat bool.
    """
    size = magnitudes.numel()
    end = max(0, min(threshold.block * block - element, size))
    torch.ge(magnitudes[:end], threshold.value, out=out[:end])
    torch.gt(magnitudes[end:], threshold.value, out=out[end:])
    if threshold.ties and 0 <= threshold.block * block - element < size:
        part = slice(end, min(end + block, size))
        equal = torch.eq(magnitudes[part], threshold.value, out=flags[part])
        out[part].masked_fill_(equal.logical_and_(equal.cumsum(0) <= threshold.ties), 1)


def count(search: Search, bits: Tensor, block: int, over: Tensor, inside: Tensor) -> Counts | list[Tensor]:
    """The counts of one search in one tile; on a device as tensors, for `counts_of`.

    Args:
        search: state of the search.
        bits: magnitudes of the tile as int32, flat.
        block: number of elements in a block.
        over: scratch buffer, flat bool.
        inside: scratch buffer, flat bool.
    """
    if bits.device.type == "cpu":
        return _count_on_cpu(search, bits.numpy(), block, over.numpy(), inside.numpy())
    return count_on_device(search, bits, block)


def count_on_device(search: Search, bits: Tensor, block: int) -> list[Tensor]:
    """The counts as tensors: positive, above, above the guess, equal to the guess by block, and the histogram."""
    blocks, bins = -(-bits.numel() // block), max(1, search.bins)
    equal = torch.zeros(blocks * block, dtype=torch.int32, device=bits.device)
    equal[: bits.numel()] = bits == search.guess
    histogram = torch.zeros(bins + 1, dtype=torch.int64, device=bits.device)
    within = (bits >= search.low) & (bits <= search.high)
    numbers = torch.where(within, (bits - search.low) >> search.shift, bins).to(torch.int64)
    histogram.index_add_(0, numbers, torch.ones(1, dtype=torch.int64, device=bits.device).expand_as(numbers))
    sums = [(bits > bound).sum() for bound in (0, search.high, search.guess)]
    return [torch.stack(sums), equal.view(blocks, block).sum(1), histogram[:bins]]


def counts_of(search: Search, tiles: list[list[Tensor]]) -> Counts:
    """The counts of several tiles together, in order; waits for the device."""
    sums = torch.stack([tile[0] for tile in tiles]).sum(0)
    equal = torch.cat([tile[1] for tile in tiles])
    histogram = torch.stack([tile[2] for tile in tiles]).sum(0)
    found = torch.cat([sums, equal, histogram]).cpu().numpy()
    positive, above, above_guess = (int(number) for number in found[:3])
    blocks = equal.numel()
    inside = found[3 + blocks :] if search.bins else None
    by_block = tuple(found[3 : 3 + blocks].tolist())
    return Counts(positive if search.rank is None else 0, above, inside, above_guess, by_block)


def _count_on_cpu(search: Search, bits: Any, block: int, over: Any, inside: Any) -> Counts:
    positive = int(np.count_nonzero(np.greater(bits, 0, out=inside))) if search.rank is None else 0
    higher = int(np.count_nonzero(np.greater(bits, search.high, out=over)))
    number = int(np.count_nonzero(np.greater(bits, search.low - 1, out=inside))) - higher
    np.logical_xor(inside, over, out=inside)  # the elements in the bracket
    if not search.bins:
        return Counts(positive, higher, None, higher, count_per_block(inside, block))
    histogram = np.zeros(search.bins, dtype=np.int64)
    above_guess, equal = higher, np.zeros(-(-len(bits) // block), dtype=np.int64)
    for indices, values in _gather(bits, inside, number):
        histogram += np.bincount(values - search.low >> search.shift, minlength=search.bins)
        above_guess += int(np.count_nonzero(values > search.guess))
        equal += np.bincount(indices[values == search.guess] // block, minlength=len(equal))
    return Counts(positive, higher, histogram, above_guess, tuple(equal.tolist()))


def count_per_block(flags: np.ndarray[Any, Any], block: int) -> tuple[int, ...]:
    """Count the flags that are set in each block."""
    complete = len(flags) // block * block
    rest = [int(np.count_nonzero(flags[complete:]))] if complete < len(flags) else []
    if block % 8:
        return (*np.count_nonzero(flags[:complete].reshape(-1, block), axis=1).tolist(), *rest)
    # adds eight flags at once as int64; each byte can hold a sum of 2^7 flags
    rows = math.gcd(block // 8, _ROW_FLAGS)
    sums = flags[:complete].view(np.int64).reshape(-1, rows, block // 8 // rows).sum(1).view(np.uint8)
    return (*sums.sum(1, dtype=np.int64).tolist(), *rest)


def _gather(bits: Any, flags: Any, number: int) -> Iterator[tuple[Any, Any]]:
    """The indices and the values of the `number` flagged elements.

    Many elements are gathered in several parts to bound the memory.
    """
    size = len(bits)
    step = -(-size // _GATHER_PARTS) if number > size // _GATHER_PARTS else size
    for begin in range(0, size, step):
        indices = flagged_indices(flags[begin : begin + step])
        yield indices + begin, bits[begin : begin + step].take(indices)


def flagged_indices(flags: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The indices of the flags that are set, fast if they are few: eight flags are tested at once."""
    complete = len(flags) // 8 * 8
    words = flags[:complete].view(np.int64)
    eights = (words != 0).nonzero()[0]
    within = words.take(eights).view(np.bool_).nonzero()[0]
    indices: np.ndarray[Any, Any] = eights.take(within >> 3)
    indices <<= 3
    within &= 7
    indices += within
    if complete == len(flags):
        return indices
    return np.concatenate([indices, np.flatnonzero(flags[complete:]) + complete])
