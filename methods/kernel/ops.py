"""Runs of torch operations without Python between them: the inner loops of the methods.

Each torch operation lets go of the interpreter's lock and takes it again, some hundred times a tile. Where threads
compute side by side, each of these may end in a sleep that lasts longer than the operation: with two threads a third of
the time went there, and with more it only gets worse. TorchScript runs a whole function with the lock let go, and does
the same operations in the same order, so the bytes are those of the function itself. That is what runs on a device that
takes its work from a queue, and where this torch or this Python has no TorchScript.

Functions here take buffers and numbers, and allocate nothing. This module imports torch: others reach it by
`lazy.scripts`.
"""

# no `from __future__ import annotations` here: TorchScript reads the annotations as they are
import functools
import threading
import warnings
from collections.abc import Callable
from typing import List, NamedTuple, Optional, TypeVar  # noqa: UP035

import torch
from torch import Tensor

from .lazy import on_cpu

_F = TypeVar("_F", bound=Callable[..., Tensor])
_compiling = threading.Lock()


def scripted(function: _F) -> _F:
    """The function, run by TorchScript on the CPU. Its first argument is a buffer, which tells the device."""
    compiled: list[Callable[..., Tensor]] = []

    @functools.wraps(function)
    def run(out: Tensor, *arguments: object) -> Tensor:
        if not compiled:
            with _compiling:
                if not compiled:
                    compiled.append(_compiled(function))
        return (compiled[0] if on_cpu(out) else function)(out, *arguments)

    return run  # type: ignore[return-value]


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer releases of torch announce that it will go one day
            return torch.jit.script(function)  # type: ignore[no-any-return]
    except (AttributeError, RuntimeError):
        return function


@scripted
def difference(out: Tensor, x: Tensor, base: Tensor, absolute: bool) -> Tensor:
    """``x - base``, in the dtype of `out` and `base`; or the size of that."""
    out.copy_(x).sub_(base)
    return out.abs_() if absolute else out


@scripted
def add_to_base(out: Tensor, factor: float, term: Tensor, base: Tensor) -> Tensor:
    """``base + factor out``. `term` is scratch, or `base` itself in the dtype of `out`."""
    if factor != 1:
        out.mul_(factor)
    return out.add_(term.copy_(base))


@scripted
def weighted_sum(
    out: Tensor,
    term: Tensor,
    inputs: List[Tensor],  # noqa: UP006
    factors: List[float],  # noqa: UP006
    origin: Optional[Tensor],  # noqa: UP045
) -> Tensor:
    """``sum_i factors[i] (inputs[i] - origin)``, added in order; no origin counts as 0. `term` is scratch."""
    for i in range(len(inputs)):
        vector = (out if i == 0 else term).copy_(inputs[i])
        if origin is not None:
            vector.sub_(origin)
        if factors[i] != 1:
            vector.mul_(factors[i])
        if i > 0:
            out.add_(vector)
    return out


def pairwise_fold_impl(values: Tensor, width: int) -> Tensor:
    """See `reductions.pairwise_fold`."""
    columns = values.size(-1)
    while columns > width:
        half = columns // 2
        values.narrow(-1, 0, half).add_(values.narrow(-1, columns - half, half))
        columns -= half
    return values.narrow(-1, 0, columns)


class Places(NamedTuple):
    """Where the block sums of a tile's tensors go, see `reductions.BlockSums`.

    Args:
        sums: of each part of a tile, float64, shape (tensors, blocks, columns).
        spans: of each part where it begins and ends in the tile, and how many rows are added up in the work dtype; 0
            where half is added to half, in a copy, until as many columns as there are in `sums` are left.
        rows: scratch in the work dtype, shape (blocks, columns) of a part whose rows are added.
        at_once: whether `torch.sum` adds these rows in their order.
    """

    sums: List[Tensor]  # noqa: UP006
    spans: List[List[int]]  # noqa: UP006
    rows: Tensor
    at_once: bool


def block_sums_impl(values: Tensor, number: int, places: Places) -> Tensor:
    """The block sums of a tensor's values, which stay as they are, into the places of tensor `number`."""
    flat, rows = values.view(-1), places.rows
    for part in range(len(places.sums)):
        into = places.sums[part][number]
        start, end, height = places.spans[part]
        blocks = into.size(0)
        within = flat[start:end].view(blocks, -1)
        if height == 0:
            into.copy_(pairwise_fold_impl(within.clone(), into.size(1)))
            continue
        lines = within.view(blocks, height, -1)
        if places.at_once:
            torch.sum(lines, [1], out=rows)
        else:
            torch.add(lines[:, 0], lines[:, 1], out=rows)
            for row in range(2, height):
                rows.add_(lines[:, row])
        into.copy_(rows)
    return values


# scripts call each other by the names of the functions themselves
pairwise_fold, block_sums = scripted(pairwise_fold_impl), scripted(block_sums_impl)


@scripted
def gram(
    product: Tensor,
    vectors: List[Tensor],  # noqa: UP006
    inputs: List[Tensor],  # noqa: UP006
    origin: Optional[Tensor],  # noqa: UP045
    places: Places,
) -> Tensor:
    """Adds up the products of each two of ``inputs[i] - origin``; no origin counts as 0.

    Args:
        product: scratch.
        vectors: scratch: one buffer for each input.
        inputs: of a tile.
        origin: in the dtype of the vectors.
        places: of the sums, pair by pair.
    """
    for i in range(len(inputs)):
        vectors[i].copy_(inputs[i])
        if origin is not None:
            vectors[i].sub_(origin)
    number = 0
    for i in range(len(inputs)):
        for j in range(i, len(inputs)):
            torch.mul(vectors[i], vectors[j], out=product)
            block_sums_impl(product, number, places)
            number += 1
    return product


@scripted
def rounded(out: Tensor, values: Tensor) -> Tensor:
    """Rounds the values into `out`; the least and the largest of them, or NaN."""
    extremes = torch.stack([values.amin(), values.amax()])
    out.copy_(values)
    return extremes


@scripted
def accumulate(out: Tensor, term: Tensor, factor: float, first: bool) -> Tensor:
    """``out + factor term``; or ``factor term``, where `term` is `out`, the first of a sum. `term` is used up."""
    if factor != 1:
        term.mul_(factor)
    return term if first else out.add_(term)


def bits(values: Tensor) -> Tensor:
    """Floats as the integers of their bits, of which the highest is the sign. A view; TorchScript can't make it."""
    return values.view(torch.int64 if values.dtype == torch.float64 else torch.int32)


@scripted
def sign_consensus_sum(
    out: Tensor,
    terms: List[Tensor],  # noqa: UP006
    term_bits: List[Tensor],  # noqa: UP006
    scales: List[float],  # noqa: UP006
    divisors: List[float],  # noqa: UP006
    factors: List[float],  # noqa: UP006
    floor: float,
    sign: Tensor,
    sign_bits: Tensor,
    agree: Tensor,
    divisor: Tensor,
) -> Tensor:
    """The sum of the terms that have the sign of the sum of all, element by element; see `task_vectors.elected_mean`.

    Args:
        out: the first of the terms.
        terms: are used up.
        term_bits: the `bits` of each term.
        scales: what each term is multiplied by before the election, or none.
        divisors: of each term, or none.
        factors: what each term is multiplied by after it, or none.
        floor: the least divisor; 0 stands for 1 where the divisor is exactly 0.
        sign: scratch, as the others are.
        sign_bits: its `bits`.
        agree: scratch.
        divisor: scratch.
    """
    for i in range(len(scales)):
        if scales[i] != 1:
            terms[i].mul_(scales[i])
    if len(terms) > 1:
        torch.add(terms[0], terms[1], out=sign)
    else:
        sign.copy_(terms[0])
    for i in range(2, len(terms)):
        sign.add_(terms[i])
    flip = sign_bits.bitwise_and_(-0x7FFFFFFFFFFFFFFF - 1 if sign.dtype == torch.float64 else -0x80000000)
    for i in range(len(terms)):
        term = terms[i]
        term_bits[i].bitwise_xor_(flip)
        term.clamp_(min=0)
        if len(divisors) > 0:
            torch.gt(term, 0, out=agree)
            if divisors[i] != 1:
                agree.mul_(divisors[i])
            if i == 0:
                divisor.copy_(agree)
            else:
                divisor.add_(agree)
        if len(factors) > 0 and factors[i] != 1:
            term.mul_(factors[i])
        if i > 0:
            out.add_(term)
    if len(divisors) > 0:
        if floor != 0:
            divisor.clamp_(min=floor)
        else:
            divisor.add_(torch.eq(divisor, 0, out=agree))
        out.div_(divisor)
    term_bits[0].bitwise_xor_(flip)
    return out


@scripted
def hard_band(
    values: Tensor,
    scratch: Tensor,
    left: int,
    least: List[float],  # noqa: UP006
    dropped: int,
    largest: List[float],  # noqa: UP006
) -> Tensor:
    """The values that are large enough, and not too large; 0 for the others.

    A value is large enough where its size is above the first of `least`, or from the `left`-th value on the second;
    without any, all are. It is too large where that is so with `largest` and `dropped`. NaN stays, and an infinity that
    is too large leaves NaN.

    Args:
        values: flat.
        scratch: as large.
        left: how many.
        least: two numbers, or none.
        dropped: how many.
        largest: two numbers, or none.
    """
    if len(largest) > 0:
        torch.ops.aten.hardshrink(values[:dropped], largest[0], out=scratch[:dropped])
        torch.ops.aten.hardshrink(values[dropped:], largest[1], out=scratch[dropped:])
    if len(least) > 0:
        torch.ops.aten.hardshrink(values[:left], least[0], out=values[:left])
        torch.ops.aten.hardshrink(values[left:], least[1], out=values[left:])
    return values.sub_(scratch) if len(largest) > 0 else values
