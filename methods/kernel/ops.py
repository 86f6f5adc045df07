"""The inner loops of the methods: sequences of torch operations, compiled with TorchScript on the CPU.

In eager mode each torch operation releases and reacquires the GIL, about a hundred times per tile. With several compute
threads each reacquisition can sleep for longer than the operation takes: a third of the time with two threads, and more
with more threads. A TorchScript function runs without the GIL. It executes the same operations in the same order, so it
computes the same bytes as the Python function, which runs on other devices and where TorchScript is not available.

The functions take buffers and numbers and allocate no memory. ``x_impl`` is a Python function that other functions in
this module or `mask_ops` call; ``x`` is its compiled version. Other modules import this one through `lazy_ops`, because
it imports torch.
"""

# Without `from __future__ import annotations`, because TorchScript evaluates the annotations.
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
    """Compile a function with TorchScript for tensors on the CPU. Its first argument determines the device."""
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
            warnings.simplefilter("ignore")  # torch.jit is deprecated in newer releases
            return torch.jit.script(function)  # type: ignore[no-any-return]
    except (AttributeError, RuntimeError):
        return function


@scripted
def difference(out: Tensor, x: Tensor, base: Tensor, absolute: bool) -> Tensor:
    """``x - base`` in the dtype of `out` and `base`, or its absolute value."""
    out.copy_(x).sub_(base)
    return out.abs_() if absolute else out


@scripted
def add_to_base(out: Tensor, factor: float, term: Tensor, base: Tensor) -> Tensor:
    """``base + factor * out``. `term` is a scratch buffer, or `base` itself if it has the dtype of `out`."""
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
    """``sum_i factors[i] * (inputs[i] - origin)``, added in order; None means an origin of 0. `term` is scratch."""
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
    """See `block_sums.pairwise_fold`."""
    columns = values.size(-1)
    while columns > width:
        half = columns // 2
        values.narrow(-1, 0, half).add_(values.narrow(-1, columns - half, half))
        columns -= half
    return values.narrow(-1, 0, columns)


class BlockSumBuffers(NamedTuple):
    """The buffers for the block sums of a tile's tensors; see `block_sums.BlockSums`.

    Args:
        sums: partial sums of each part of the tile, float64, shape (tensors, blocks, columns).
        spans: start, end and height of each part of the tile. Height is the number of rows of a block that are added in
            the work dtype; 0 means that halves are added pairwise until the number of columns in `sums` is reached.
        rows: scratch in the work dtype, shape (blocks, columns), for the part with rows.
        at_once: whether `torch.sum` adds the rows in order.
    """

    sums: List[Tensor]  # noqa: UP006
    spans: List[List[int]]  # noqa: UP006
    rows: Tensor
    at_once: bool


def block_sums_impl(values: Tensor, index: int, buffers: BlockSumBuffers) -> Tensor:
    """Store the block sums of a tensor as those of tensor `index`; `values` is not modified."""
    flat, rows = values.view(-1), buffers.rows
    for part in range(len(buffers.sums)):
        into = buffers.sums[part][index]
        start, end, height = buffers.spans[part]
        blocks = into.size(0)
        within = flat[start:end].view(blocks, -1)
        if height == 0:
            into.copy_(pairwise_fold_impl(within.clone(), into.size(1)))
            continue
        lines = within.view(blocks, height, -1)
        if buffers.at_once:
            torch.sum(lines, [1], out=rows)
        else:
            torch.add(lines[:, 0], lines[:, 1], out=rows)
            for row in range(2, height):
                rows.add_(lines[:, row])
        into.copy_(rows)
    return values


# TorchScript functions call each other through the Python functions.
pairwise_fold, block_sums = scripted(pairwise_fold_impl), scripted(block_sums_impl)


@scripted
def gram(
    product: Tensor,
    vectors: List[Tensor],  # noqa: UP006
    inputs: List[Tensor],  # noqa: UP006
    origin: Optional[Tensor],  # noqa: UP045
    buffers: BlockSumBuffers,
) -> Tensor:
    """Sum the products of each pair of vectors ``inputs[i] - origin``; None means an origin of 0.

    Args:
        product: scratch buffer.
        vectors: scratch buffers, one per input.
        inputs: inputs of the tile.
        origin: origin in the dtype of the vectors, or None.
        buffers: buffers of the sums, one tensor per pair.
    """
    for i in range(len(inputs)):
        vectors[i].copy_(inputs[i])
        if origin is not None:
            vectors[i].sub_(origin)
    pair = 0
    for i in range(len(inputs)):
        for j in range(i, len(inputs)):
            torch.mul(vectors[i], vectors[j], out=product)
            block_sums_impl(product, pair, buffers)
            pair += 1
    return product


@scripted
def rounded(out: Tensor, values: Tensor) -> Tensor:
    """Round the values to the dtype of `out`, and return the minimum and the maximum, or NaN."""
    extremes = torch.stack([values.amin(), values.amax()])
    out.copy_(values)
    return extremes


@scripted
def accumulate(out: Tensor, term: Tensor, factor: float, first: bool) -> Tensor:
    """``out + factor * term``, or ``factor * term`` if `term` is `out`, the first of a sum. Overwrites `term`."""
    if factor != 1:
        term.mul_(factor)
    return term if first else out.add_(term)


def bits(values: Tensor) -> Tensor:
    """View floats as integers with the same bits; the highest one is the sign. TorchScript can't create such a view."""
    return values.view(torch.int64 if values.dtype == torch.float64 else torch.int32)


def add_terms_impl(out: Tensor, terms: List[Tensor]) -> Tensor:  # noqa: UP006
    """Set `out` to the sum of the terms, added in order."""
    if len(terms) > 1:
        torch.add(terms[0], terms[1], out=out)
    else:
        out.copy_(terms[0])
    for i in range(2, len(terms)):
        out.add_(terms[i])
    return out


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
    """For each element, sum the terms that have the sign of the sum of all terms; see `task_vectors.elected_mean`.

    Args:
        out: first of the terms.
        terms: terms of the sum, which are overwritten.
        term_bits: `bits` of each term.
        scales: factor of each term before the election, or none.
        divisors: divisor of each term, or none.
        factors: factor of each term after the election, or none.
        floor: minimum divisor; with 0 an exact zero counts as 1.
        sign: scratch buffer.
        sign_bits: `bits` of `sign`.
        agree: scratch buffer.
        divisor: scratch buffer.
    """
    for i in range(len(scales)):
        if scales[i] != 1:
            terms[i].mul_(scales[i])
    add_terms_impl(sign, terms)
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
    kept: int,
    minimum: List[float],  # noqa: UP006
    dropped: int,
    maximum: List[float],  # noqa: UP006
) -> Tensor:
    """Set the values whose magnitude is outside a band to 0.

    A value passes a bound if its magnitude is above the bound's first number, or above the second number from the
    element `kept` (`dropped` for `maximum`) onwards. The values that pass `minimum` and not `maximum` are kept. NaN is
    kept, and an infinity that passes `maximum` becomes NaN.

    Args:
        values: values, flat.
        scratch: scratch buffer of the same size.
        kept: number of values that the first number of `minimum` applies to.
        minimum: the two numbers of the lower bound, or none.
        dropped: number of values that the first number of `maximum` applies to.
        maximum: the two numbers of the upper bound, or none.
    """
    if len(maximum) > 0:
        torch.ops.aten.hardshrink(values[:dropped], maximum[0], out=scratch[:dropped])
        torch.ops.aten.hardshrink(values[dropped:], maximum[1], out=scratch[dropped:])
    if len(minimum) > 0:
        torch.ops.aten.hardshrink(values[:kept], minimum[0], out=values[:kept])
        torch.ops.aten.hardshrink(values[kept:], minimum[1], out=values[kept:])
    return values.sub_(scratch) if len(maximum) > 0 else values
