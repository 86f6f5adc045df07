"""The scripts of random masks: hashes, what of them lies below a bound, and vectors that are thinned by that.

As in `scripts`; others reach it by `lazy.random_scripts`.
"""

# no `from __future__ import annotations` here: TorchScript reads the annotations as they are
from typing import List, NamedTuple  # noqa: UP035

import torch
from torch import Tensor

from .ops import Places, block_sums_impl, scripted


class Stream(NamedTuple):
    """Which hashes: see `hashed`. All numbers are below 2^31 in size.

    Args:
        columns: int32.
        rows: int32, at least as many as there are whole rows.
        start: is added to all.
        tail: is added in the last row instead, where that isn't whole.
        first: multiplier of the first round.
        between: is added after it.
        second: multiplier of the second.
    """

    columns: Tensor
    rows: Tensor
    start: int
    tail: int
    first: int
    between: int
    second: int


def _hashed(out: Tensor, scratch: Tensor, stream: Stream) -> Tensor:
    """Hashes of a range of indices: rounds of C. Wellons' lowbias32, with a number added in between.

    The number that is hashed at place ``r * len(columns) + c`` is ``rows[r] + columns[c] + start``, modulo 2^32; after
    the last whole row it is ``columns[c] + tail``.

    Args:
        out: flat int32.
        scratch: as large.
        stream: the numbers.
    """
    width = stream.columns.numel()
    whole = out.numel() // width
    if whole > 0:
        steps = stream.columns + stream.start
        torch.add(stream.rows[:whole].unsqueeze(1), steps, out=out[: whole * width].view(-1, width))
    rest = out.numel() - whole * width
    if rest > 0:
        torch.add(stream.columns[:rest], stream.tail, out=out[whole * width :])
    torch.bitwise_right_shift(out, 16, out=scratch).bitwise_and_(0xFFFF)  # zeros come in from the left
    out.bitwise_xor_(scratch).mul_(stream.first).add_(stream.between)
    torch.bitwise_right_shift(out, 15, out=scratch).bitwise_and_(0x1FFFF)
    out.bitwise_xor_(scratch).mul_(stream.second)
    torch.bitwise_right_shift(out, 16, out=scratch).bitwise_and_(0xFFFF)
    return out.bitwise_xor_(scratch)


def _below(out: Tensor, values: Tensor, bounds: Tensor, opposite: bool, block: int, flags: Tensor) -> Tensor:
    """1 where a value is less than the bound of its block and column, else 0; or the other way round.

    Args:
        out: flat.
        values: int8, as many.
        bounds: int8, shape (blocks, columns).
        opposite: whether 1 stands for the others.
        block: elements of a block, a multiple of the columns.
        flags: scratch: int8, as many as there are values.
    """
    columns, size = bounds.size(1), out.numel()
    for part in range(3):  # the whole blocks, then the whole rows of the last one, then what is left
        width = columns if part < 2 else size % columns
        start = 0 if part == 0 else size // block * block if part == 1 else size // columns * columns
        end = size // block * block if part == 0 else size // columns * columns if part == 1 else size
        if start < end:
            shape = [(end - start) // block if part == 0 else 1, -1, width]
            row = start // block
            limits = bounds[row : row + shape[0], :width].unsqueeze(1)
            if opposite:
                torch.ge(values[start:end].view(shape), limits, out=flags[start:end].view(shape))
            else:
                torch.lt(values[start:end].view(shape), limits, out=flags[start:end].view(shape))
    return out.copy_(flags[:size])


hashed, below = scripted(_hashed), scripted(_below)


class Mask(NamedTuple):
    """Which of a range of values are kept, at random: those of which the octet of a hash is below its bound.

    Args:
        begin: of the range, a multiple of four: each hash serves as many values.
        end: of it.
        stream: of the hashes.
        bounds: of `below`.
        opposite: of `below`.
        block: of `below`.
        factor: what is kept is multiplied by it.
    """

    begin: int
    end: int
    stream: Stream
    bounds: Tensor
    opposite: bool
    block: int
    factor: float


class Scratch(NamedTuple):
    """What `apply_mask` computes in.

    Args:
        hashes: flat int32, for each four values one.
        octets: the same memory, int8.
        other: as large as `hashes`.
        flags: int8, as many as there are values.
        kept: float32, as many.
    """

    hashes: Tensor
    hash_bytes: Tensor
    other: Tensor
    flags: Tensor
    kept: Tensor


def _thin(values: Tensor, masks: List[Mask], scratch: Scratch) -> Tensor:  # noqa: UP006
    """The flat values that the masks keep, times their factors; 0 for the others."""
    for mask in masks:
        part = values[mask.begin : mask.end]
        hash_words = (mask.begin // 4, (mask.end + 3) // 4)
        _hashed(
            scratch.hashes[hash_words[0] : hash_words[1]], scratch.other[hash_words[0] : hash_words[1]], mask.stream
        )
        hash_bytes = scratch.hash_bytes[4 * hash_words[0] : 4 * hash_words[1]]
        flags, kept = scratch.flags[mask.begin : mask.end], scratch.kept[mask.begin : mask.end]
        part.mul_(_below(kept, hash_bytes, mask.bounds, mask.opposite, mask.block, flags))
        if mask.factor != 1:
            part.mul_(mask.factor)
    return values


apply_mask = scripted(_thin)


@scripted
def masked_deltas(
    base: Tensor,
    vectors: List[Tensor],  # noqa: UP006
    inputs: List[Tensor],  # noqa: UP006
    masks: List[List[Mask]],  # noqa: UP006
    scratch: Scratch,
) -> Tensor:
    """Makes ``vectors[i]`` what ``masks[i]`` keep of ``inputs[i] - base``."""
    for i in range(len(inputs)):
        _thin(vectors[i].copy_(inputs[i]).sub_(base).view(-1), masks[i], scratch)
    return base


@scripted
def thinned_sizes(
    vector: Tensor,
    base: Tensor,
    inputs: List[Tensor],  # noqa: UP006
    masks: List[List[Mask]],  # noqa: UP006
    scratch: Scratch,
    places: Places,
) -> Tensor:
    """Adds up the sizes of the elements of each ``inputs[i] - base``, and of what ``masks[i]`` keep of it: two sums for
    each. `vector` is scratch."""
    for i in range(len(inputs)):
        vector.copy_(inputs[i]).sub_(base).abs_()
        block_sums_impl(vector, 2 * i, places)
        _thin(vector.view(-1), masks[i], scratch)
        block_sums_impl(vector, 2 * i + 1, places)
    return vector
