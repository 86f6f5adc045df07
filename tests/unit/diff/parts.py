"""A format that stores values in parts, one for each access, in tensors of several blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mergeloom.engine.model.logical import Decode, LogicalTensor, Part
from mergeloom.io.checkpoint.checkpoint import Checkpoint
from mergeloom.io.tensors.dtypes import DTYPES, F32, F64
from mergeloom.methods.kernel.access import (
    ALIGNED,
    Access,
    BlockRows,
    GatheredRows,
    SameRows,
    Slice,
    TransposedSlice,
    Whole,
)
from tests.support.models import toy_format

ROWS, COLUMNS, RANK = 300, 257, 3
"""Shape of every value: more than two blocks, whose boundaries lie within rows."""
ORDER = tuple((7 * row + 3) % ROWS if row % 6 else -1 for row in range(ROWS))
BLOCK = (7, 50)


def find(checkpoint: Checkpoint) -> Iterator[LogicalTensor]:
    """The values of a model that `write` wrote."""
    stored = checkpoint.tensors

    def value(name: str, *parts: tuple[str, Access], decode: Decode | None = None) -> Iterator[LogicalTensor]:
        made = tuple(Part(part, stored[part], access) for part, access in parts if part in stored)
        if made:
            dtype = DTYPES["I64"] if name == "integers" else F64 if name == "wide" else F32
            yield LogicalTensor(name, (ROWS, COLUMNS), dtype, made, decode)

    aligned, scaled = ALIGNED, Decode(toy_format.SCALED)
    yield from value("scaled", ("scaled.codes", aligned), ("scaled.scales", BlockRows(*BLOCK)), decode=scaled)
    yield from value("wide", ("wide.codes", aligned), ("wide.scales", BlockRows(*BLOCK)), decode=scaled)
    parts = ("adapted.base", aligned), ("adapted.b", SameRows()), ("adapted.a", Whole())
    yield from value("adapted", *parts, decode=Decode(toy_format.ADAPTED))
    yield from value("gathered", ("gathered.rows", GatheredRows.of(ORDER)))
    yield from value("sliced", ("fused", Slice(5, 2 * COLUMNS + 3)))
    yield from value("turned", ("turned.pairs", TransposedSlice(1, 2 * ROWS, 2)))
    yield from value("integers", ("integers.all", Slice(COLUMNS, COLUMNS)))


def make(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a model of every access stores, and its values."""
    random = torch.Generator().manual_seed(seed)

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randint(-4, 5, shape, generator=random).to(dtype)

    stored, values = {}, {}
    for name, dtype in (("scaled", torch.float32), ("wide", torch.float64)):
        codes, scales = numbers(ROWS, COLUMNS), 2 ** numbers(-(-ROWS // BLOCK[0]), -(-COLUMNS // BLOCK[1]))
        scales = scales.to(dtype) * (1 + 2.0**-40 if dtype == torch.float64 else 1)
        stored |= {f"{name}.codes": codes.bfloat16(), f"{name}.scales": scales}
        values[name] = codes * scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[:ROWS, :COLUMNS]
    base, b, a = numbers(ROWS, COLUMNS), numbers(ROWS, RANK), numbers(RANK, COLUMNS)
    stored |= {"adapted.base": base, "adapted.b": b, "adapted.a": a.bfloat16()}
    values["adapted"] = base + b @ a
    stored["gathered.rows"] = table = numbers(ROWS, COLUMNS).half()
    values["gathered"] = torch.stack([table[row] if row >= 0 else table[0] * 0 for row in ORDER])
    stored["fused"] = fused = numbers(ROWS + 1, 2 * COLUMNS + 3)
    values["sliced"] = fused[:ROWS, 5 : 5 + COLUMNS].contiguous()
    stored["turned.pairs"] = pairs = numbers(COLUMNS, 2 * ROWS)
    values["turned"] = pairs[:, 1::2].T.contiguous()
    stored["integers.all"] = numbers(ROWS + 2, COLUMNS, dtype=torch.int64) + 2**62
    values["integers"] = stored["integers.all"][1 : ROWS + 1].clone()
    stored["plain"] = values["plain"] = numbers(5)
    return stored, values
