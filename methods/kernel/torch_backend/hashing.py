"""Random numbers as a pure function of key, model and element, independent of tiles and devices."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..random_streams import FIRST, PERIOD, SECOND, STEP, Stream, streams

_WIDTH = 1 << 10


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
    for stream in streams(key, position, element, out.numel()):
        _hash(out[stream.part], scratch[stream.part], stream)
    return out


def _hash(out: Tensor, scratch: Tensor, stream: Stream) -> None:
    size = out.numel()
    rows = size // _WIDTH
    columns = _steps(_WIDTH, STEP, out.device)
    if rows:
        lines = _steps(max(1 << rows.bit_length(), _WIDTH), _WIDTH * STEP, out.device)[:rows]
        first = columns + _signed(stream.start)
        torch.add(lines.unsqueeze(1), first, out=out[: rows * _WIDTH].view(rows, _WIDTH))
    if rest := size - rows * _WIDTH:
        torch.add(columns[:rest], _signed(stream.start + rows * _WIDTH * STEP), out=out[rows * _WIDTH :])
    torch.bitwise_right_shift(out, 16, out=scratch).bitwise_and_(0xFFFF)  # as a logical shift
    out.bitwise_xor_(scratch).mul_(_signed(FIRST)).add_(_signed(stream.between))
    torch.bitwise_right_shift(out, 15, out=scratch).bitwise_and_(0x1FFFF)
    out.bitwise_xor_(scratch).mul_(_signed(SECOND))
    torch.bitwise_right_shift(out, 16, out=scratch).bitwise_and_(0xFFFF)
    out.bitwise_xor_(scratch)


@lru_cache(maxsize=16)
def _steps(number: int, step: int, device: torch.device) -> Tensor:
    """The first `number` multiples of `step` modulo 2^32."""
    return torch.arange(number, dtype=torch.int64, device=device).mul_(step % PERIOD).to(torch.int32)


def _signed(x: int) -> int:
    """The int32 with the same bits as x modulo 2^32."""
    return (x + (1 << 31)) % PERIOD - (1 << 31)
