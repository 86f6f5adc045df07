"""The inner loops of random masks: hashing, comparing hash bytes with bounds, and masking vectors.

See `ops` for how the functions are compiled and named.
"""

# Without `from __future__ import annotations`, because TorchScript evaluates the annotations.
from typing import List, NamedTuple  # noqa: UP035

import torch
from torch import Tensor

from .ops import BlockSumBuffers, block_sums_impl, scripted


class HashStream(NamedTuple):
    """The parameters of a range of hashes; see `hash_indices`. All numbers fit in an int32.

    Args:
        columns: offset of each column, int32.
        rows: offset of each complete row, int32.
        start: number that is added to all complete rows.
        tail: number that is added to the incomplete last row.
        first: multiplier of the first round.
        between: number that is added after the first round.
        second: multiplier of the second round.
    """

    columns: Tensor
    rows: Tensor
    start: int
    tail: int
    first: int
    between: int
    second: int


def hash_indices_impl(out: Tensor, scratch: Tensor, stream: HashStream) -> Tensor:
    """Hash a range of indices with the rounds of C. Wellons' lowbias32, with a number added between them.

    Element ``r * len(columns) + c`` is the hash of ``rows[r] + columns[c] + start`` modulo 2^32. In the incomplete last
    row it is the hash of ``columns[c] + tail``.

    Args:
        out: hashes, flat int32.
        scratch: scratch buffer of the same size.
        stream: parameters of the hashes.
    """
    width = stream.columns.numel()
    complete = out.numel() // width
    if complete > 0:
        steps = stream.columns + stream.start
        torch.add(stream.rows[:complete].unsqueeze(1), steps, out=out[: complete * width].view(-1, width))
    rest = out.numel() - complete * width
    if rest > 0:
        torch.add(stream.columns[:rest], stream.tail, out=out[complete * width :])
    torch.bitwise_right_shift(out, 16, out=scratch).bitwise_and_(0xFFFF)  # as a logical shift
    out.bitwise_xor_(scratch).mul_(stream.first).add_(stream.between)
    torch.bitwise_right_shift(out, 15, out=scratch).bitwise_and_(0x1FFFF)
    out.bitwise_xor_(scratch).mul_(stream.second)
    torch.bitwise_right_shift(out, 16, out=scratch).bitwise_and_(0xFFFF)
    return out.bitwise_xor_(scratch)


def below_bounds_impl(out: Tensor, values: Tensor, bounds: Tensor, opposite: bool, block: int, flags: Tensor) -> Tensor:
    """Set `out` to 1 where a value is below the bound of its block and column, else to 0.

    Args:
        out: mask, flat.
        values: values of the same size, int8.
        bounds: bounds, int8, shape (blocks, columns).
        opposite: whether to swap 1 and 0.
        block: number of elements in a block, a multiple of the number of columns.
        flags: scratch buffer of the same size, int8.
    """
    columns, size = bounds.size(1), out.numel()
    for part in range(3):  # complete blocks, complete rows of the last block, the incomplete row
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


hash_indices, below_bounds = scripted(hash_indices_impl), scripted(below_bounds_impl)


class Mask(NamedTuple):
    """A random mask of a range of values, which keeps a value if its hash byte is below a bound.

    Args:
        begin: start of the range, a multiple of four, because a hash has four bytes.
        end: end of the range.
        stream: parameters of the hashes.
        bounds: argument of `below_bounds`.
        opposite: argument of `below_bounds`.
        block: argument of `below_bounds`.
        factor: factor of the kept values.
    """

    begin: int
    end: int
    stream: HashStream
    bounds: Tensor
    opposite: bool
    block: int
    factor: float


class Scratch(NamedTuple):
    """The scratch buffers of `apply_mask`.

    Args:
        hashes: one hash per four values, flat int32.
        hash_bytes: view of `hashes` as int8.
        other: buffer of the size of `hashes`.
        flags: one int8 per value.
        kept: one float32 per value.
    """

    hashes: Tensor
    hash_bytes: Tensor
    other: Tensor
    flags: Tensor
    kept: Tensor


def apply_mask_impl(values: Tensor, masks: List[Mask], scratch: Scratch) -> Tensor:  # noqa: UP006
    """Multiply flat values by the masks and their factors: values that are not kept become 0."""
    for mask in masks:
        part = values[mask.begin : mask.end]
        first, end = mask.begin // 4, (mask.end + 3) // 4
        hash_indices_impl(scratch.hashes[first:end], scratch.other[first:end], mask.stream)
        hash_bytes = scratch.hash_bytes[4 * first : 4 * end]
        flags, kept = scratch.flags[mask.begin : mask.end], scratch.kept[mask.begin : mask.end]
        part.mul_(below_bounds_impl(kept, hash_bytes, mask.bounds, mask.opposite, mask.block, flags))
        if mask.factor != 1:
            part.mul_(mask.factor)
    return values


apply_mask = scripted(apply_mask_impl)


@scripted
def masked_deltas(
    base: Tensor,
    vectors: List[Tensor],  # noqa: UP006
    inputs: List[Tensor],  # noqa: UP006
    masks: List[List[Mask]],  # noqa: UP006
    scratch: Scratch,
) -> Tensor:
    """``vectors[i] = masks[i] * (inputs[i] - base)``."""
    for i in range(len(inputs)):
        apply_mask_impl(vectors[i].copy_(inputs[i]).sub_(base).view(-1), masks[i], scratch)
    return base


@scripted
def masked_l1_sums(
    vector: Tensor,
    base: Tensor,
    inputs: List[Tensor],  # noqa: UP006
    masks: List[List[Mask]],  # noqa: UP006
    scratch: Scratch,
    buffers: BlockSumBuffers,
) -> Tensor:
    """Sum ``abs(inputs[i] - base)`` as tensor 2i, and the part that ``masks[i]`` keep as tensor 2i + 1.

    `vector` is a scratch buffer.
    """
    for i in range(len(inputs)):
        vector.copy_(inputs[i]).sub_(base).abs_()
        block_sums_impl(vector, 2 * i, buffers)
        apply_mask_impl(vector.view(-1), masks[i], scratch)
        block_sums_impl(vector, 2 * i + 1, buffers)
    return vector
