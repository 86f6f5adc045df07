"""Models whose tensors are stored in several parts, and kernels that merge them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergeloom.methods import merge_methods
from mergeloom.methods.kernel.access import ALIGNED, Access, BlockRows, Nibbles, Slice, TransposedSlice
from mergeloom.methods.kernel.composition import Composition, Part
from mergeloom.methods.kernel.decoder import Decoder, low_rank
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.spec import InputSpec
from tests.support.methods.factors import LAYOUTS

Shape = tuple[int, ...]
KEY = 0x1234_5678_9ABC_DEF1


@dataclass(frozen=True)
class Stored:
    """One tensor of a model.

    Args:
        decoder: computes the value from the parts; None if there is one part, which is the value.
        parts: access to each part, and the part.
        parameters: parameters of the decoder.
        round_to: dtype that the value is rounded to; None for none.
    """

    decoder: Decoder | None
    parts: Sequence[tuple[Access, Tensor]]
    parameters: Mapping[str, Any]
    round_to: str | None = None


SCALED = Decoder("scaled", lambda codes, scales: codes * scales)
OFFSET = Decoder("offset", lambda codes, scales, zeros: (codes - zeros) * scales)
PACKED = Decoder("packed", lambda codes, scales: (codes - 8.0) * scales)
TWICE_SCALED = Decoder("twice scaled", lambda codes, scales, total: codes * (scales * total))
ADAPTED = Decoder("adapted", lambda base, left, right, *, scale: base + scale * low_rank(left, right))
ADAPTED_CODES = Decoder(
    "adapted codes", lambda codes, scales, left, right, *, scale: codes * scales + scale * low_rank(left, right)
)


class Maker:
    """Draws stored tensors of one shape.

    Args:
        seed: seed of the random numbers.
        shape: shape of the values.
        bad: whether some of the stored numbers are NaN or infinite.
        layouts: names of the ways to store factors to choose from.
    """

    def __init__(self, seed: int, shape: Shape, *, bad: bool = False, layouts: Sequence[str] = tuple(LAYOUTS)) -> None:
        self.random = np.random.default_rng(seed)
        self.shape, self.bad, self.layouts = shape, bad, layouts
        rows, self.columns = ((1, 1, *shape))[-2:]
        self.stack, self.rows = math.prod(shape[:-2]), rows

    def numbers(self, shape: Shape, dtype: torch.dtype, size: float = 1.0) -> Tensor:
        """Numbers of a floating-point dtype, with zeros of both signs."""
        values = self.random.standard_normal(shape) * size
        values = np.where(self.random.random(shape) < 0.05, self.random.choice([0.0, -0.0]), values)
        tensor = torch.from_numpy(np.array(values)).to(dtype)
        if self.bad and tensor.numel():
            flat = tensor.view(-1).to(torch.float32)
            flat[int(self.random.integers(flat.numel()))] = float(self.random.choice([np.nan, np.inf, -np.inf]))
            tensor = flat.to(dtype).view(tensor.shape)
        return tensor

    def codes(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        """All 8-bit codes of a dtype that are finite."""
        codes = torch.from_numpy(self.random.integers(0, 256, shape, dtype=np.uint8))
        if not dtype.is_floating_point:
            return codes.view(dtype)
        finite = torch.isfinite(codes.view(dtype).to(torch.float32))
        return torch.where(finite, codes, 0x25).view(dtype)

    def blocks(self, height: int, width: int) -> tuple[BlockRows, Shape]:
        """The access to an element for each block, and the shape of the part."""
        access = BlockRows(height, width)
        return access, (self.stack * math.ceil(self.rows / height), math.ceil(self.columns / width))

    def plain(self) -> Stored:
        """A value in one of the usual dtypes."""
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        return Stored(None, [(ALIGNED, self.numbers(self.shape, dtypes[self.random.integers(3)]))], {})

    def fp8_blocks(self) -> Stored:
        """FP8 codes with a scale for each block."""
        dtype = (torch.float8_e4m3fn, torch.float8_e5m2)[self.random.integers(2)]
        access, shape = self.blocks(*((128, 128), (3, 5), (16, 40), (1, 7))[self.random.integers(4)])
        scales = self.numbers(shape, (torch.float32, torch.bfloat16)[self.random.integers(2)], 0.01)
        return Stored(SCALED, [(ALIGNED, self.codes(self.shape, dtype)), (access, scales)], {}, "bfloat16")

    def microscaled(self) -> Stored:
        """Codes with a power of 2 for each 32 columns."""
        access, shape = self.blocks(1, 32)
        powers = torch.from_numpy(self.random.integers(110, 135, shape, dtype=np.uint8))
        if powers.numel():
            powers.view(-1)[0] = 255 if self.bad else 0
        parts = [(ALIGNED, self.codes(self.shape, torch.int8)), (access, powers.view(torch.float8_e8m0fnu))]
        return Stored(SCALED, parts, {})

    def packed(self) -> Stored:
        """Integers of 4 bits with an offset, two in a byte, with a scale for each 32 columns."""
        access, shape = self.blocks(1, 32)
        return Stored(PACKED, [(Nibbles("U4"), self.nibbles()), (access, self.numbers(shape, torch.bfloat16, 0.1))], {})

    def packed_floats(self) -> Stored:
        """Floating-point numbers of 4 bits, two in a byte, with a scale for each 16 columns and one for all."""
        access, shape = self.blocks(1, 16)
        scales = self.codes(shape, torch.float8_e4m3fn)
        total = self.numbers((self.stack, 1), torch.float32, 0.1)
        parts = [(Nibbles("F4"), self.nibbles()), (access, scales)]
        return Stored(TWICE_SCALED, [*parts, (BlockRows(max(1, self.rows), max(1, self.columns)), total)], {})

    def nibbles(self) -> Tensor:
        """Bytes with two numbers each, and in some rows more than the columns need."""
        width = math.ceil(self.columns / 2) + int(self.random.integers(2))
        return self.codes((*self.shape[:-1], width), torch.uint8)

    def groups(self) -> Stored:
        """Codes without a sign, with a scale and a zero for each group of rows of a column, and for each row."""
        access, shape = self.blocks(16, 1)
        by_row, row_shape = self.blocks(1, max(1, self.columns))
        zeros = self.codes(row_shape, torch.uint8)
        parts = [(ALIGNED, self.codes(self.shape, torch.uint8)), (access, self.numbers(shape, torch.float16, 0.01))]
        return Stored(OFFSET, [*parts, (by_row, zeros)], {})

    def factors(self) -> list[tuple[Access, Tensor]]:
        """The factors of a low-rank product."""
        rank = int(self.random.choice([1, 3, 8, 19]))
        layout = self.random.choice(list(self.layouts))
        dtypes = [(torch.bfloat16, torch.float32)[self.random.integers(2)] for _ in range(2)]
        pairs = zip(LAYOUTS[layout](self.shape, rank), dtypes, strict=True)
        return [(access, self.numbers(part, dtype)) for (access, part), dtype in pairs]

    def adapted(self) -> Stored:
        """A value with an adapter."""
        return Stored(ADAPTED, [*self.plain().parts, *self.factors()], {"scale": 0.3}, "bfloat16")

    def adapted_codes(self) -> Stored:
        """FP8 codes with an adapter."""
        return Stored(ADAPTED_CODES, [*self.fp8_blocks().parts, *self.factors()], {"scale": 2.0})

    def transposed(self) -> Stored:
        """A transposed slice of a stack of matrices, interleaved with another one or next to it."""
        step = int(self.random.choice([1, 2]))
        offset, height = (1, 2 * self.rows) if step == 2 else (3, self.rows + 5)
        access = TransposedSlice(offset, height, step, height * self.columns)
        return Stored(None, [(access, self.numbers((self.stack, self.columns, height), torch.bfloat16))], {})

    def transposed_packed(self) -> Stored:
        """Floating-point numbers of 4 bits of two rows in a byte, with a power of 2 for each 32 rows, transposed."""
        height, groups = math.ceil(self.rows / 2) + 1, math.ceil(self.rows / 32)
        codes = TransposedSlice(0, height, 1, height * self.columns, 2, "F4")
        powers = torch.from_numpy(self.random.integers(110, 135, (self.stack, self.columns, groups), dtype=np.uint8))
        scales = TransposedSlice(0, groups, 1, groups * self.columns, 32)
        stored = self.codes((self.stack, self.columns, height), torch.uint8)
        return Stored(SCALED, [(codes, stored), (scales, powers.view(torch.float8_e8m0fnu))], {})

    def sliced(self) -> Stored:
        """A slice of wider matrices."""
        access = Slice(2, self.columns + 3, self.rows * (self.columns + 3))
        return Stored(None, [(access, self.numbers((self.stack, self.rows, self.columns + 3), torch.float16))], {})


KINDS: Mapping[str, Callable[[Maker], Stored]] = {
    each.__name__: each
    for each in (
        *(Maker.plain, Maker.fp8_blocks, Maker.microscaled, Maker.groups, Maker.adapted, Maker.adapted_codes),
        *(Maker.transposed, Maker.sliced, Maker.packed, Maker.packed_floats, Maker.transposed_packed),
    )
}
MATRIX_KINDS = tuple(KINDS)
"""Kinds of tensors with at least one dimension."""


def merged(
    method: str, models: Sequence[Stored], shape: Shape, parameters: Mapping[str, Any], base: int | None
) -> tuple[Composition, list[Tensor]]:
    """A method's kernel of values that are computed from their parts; and all parts, complete.

    Args:
        method: name of the method.
        models: tensor of each model.
        shape: shape of the values.
        parameters: parameters of the method.
        base: index of the base model.
    """
    return composed(merge_methods()[method].kernel(InputSpec(len(models), base, shape), parameters), models)


def composed(merge: Kernel, models: Sequence[Stored]) -> tuple[Composition, list[Tensor]]:
    """A kernel whose inputs are computed from their parts; and all parts, complete.

    Args:
        merge: kernel of the values.
        models: the inputs.
    """
    shape = merge.inputs.shape
    leaves: list[tuple[Access, Tensor]] = []
    parts: list[Part] = []
    sources = []
    for model in models:
        places = tuple(range(len(leaves), len(leaves) + len(model.parts)))
        leaves += model.parts
        if model.decoder is None:
            sources += places
            continue
        kernel = model.decoder.kernel(spec_of(model.parts, shape), model.parameters)
        parts.append(Part(kernel, places, round_to=model.round_to))
        sources.append(~(len(parts) - 1))
    parts.append(Part(merge, tuple(sources), KEY, tuple(range(len(models)))))
    return Composition(spec_of(leaves, shape), parts), [part for _, part in leaves]


def spec_of(parts: Sequence[tuple[Access, Tensor]], shape: Shape) -> InputSpec:
    """The inputs of a kernel that computes values of a shape from parts."""
    accesses = tuple(access for access, _ in parts)
    return InputSpec(len(parts), None, shape, accesses, tuple(tuple(part.shape) for _, part in parts))
