"""Decoders of values that adapters change: a value of the base, and what is added to it.

All arithmetic is in float32. A product of factors is computed one rank at a time, multiplied by its scale, and added.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from enum import Enum
from typing import Any

from ..kernel.array import Array
from ..kernel.decoder import Decoder, low_rank

SCALE = "scale_{}"
"""Name of the parameter that scales what is added, by its number."""


class Delta(Enum):
    """What is added to a value, by the parts that it is computed from."""

    PRODUCT = "product"
    """Two parts: B, which has the value's rows, and A, which has its columns. Added is scale * B @ A."""
    SUM = "sum"
    """One part with the value's shape. Added is scale * part."""

    @property
    def parts(self) -> int:
        """Number of parts."""
        return 2 if self is Delta.PRODUCT else 1


REPLACED = Decoder("replaced", lambda value: value)
"""A value that an adapter has its own copy of, in another dtype than the model."""
REPLACED_ROWS = Decoder("LoRA", lambda kept, rows: kept + rows)
"""Rows of an embedding that an adapter replaces: each part has zeros in the rows of the other."""


@functools.cache
def with_deltas(base: Decoder | None, count: int, deltas: tuple[Delta, ...]) -> Decoder:
    """Return the decoder of a value that adapters change.

    Args:
        base: decoder of the base's value; None if it is stored as it is.
        count: number of parts that the base's value is computed from.
        deltas: what is added, in order. Its parts follow those of the base's value, and its scales are parameters with
            the names of `SCALE`, in addition to those of `base`.
    """
    names = [SCALE.format(number) for number in range(len(deltas))]

    def value(*parts: Any, **parameters: Any) -> Array:
        scales = [parameters.pop(name) for name in names]
        result: Array = parts[0] if base is None else base.function(*parts[:count], **parameters)
        remaining: Iterator[Any] = iter(parts[count:])
        for delta, scale in zip(deltas, scales, strict=True):
            added = low_rank(next(remaining), next(remaining)) if delta is Delta.PRODUCT else next(remaining)
            result = result + scale * added
        return result

    return Decoder("LoRA" if base is None else f"{base.name} + LoRA", value)
