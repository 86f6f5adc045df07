"""Decoders of values with adapters: the base's value, and what each adapter adds to it, in the adapters' order.

Arithmetic is in float32. A low-rank product adds its ranks in order; then it is multiplied by the adapter's scale, and
added to the value. DoRA (arXiv:2402.09353) then scales each row or column to a trained length. PEFT computes the
present length in the weight's dtype; here it is the root of a sum in float64, rounded to float32 once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from enum import Enum
from typing import Any

from ..kernel.array import Array
from ..kernel.decoder import Decoder, low_rank
from ..kernel.language import Inputs, single, sqrt, wide
from ..kernel.spec import MethodError


class Term(Enum):
    """What an adapter changes in a value, and the parts that it takes; the value is the name in reports."""

    LORA = "LoRA"  # left factor, right factor: adds their product
    BIAS = "LoRA bias"  # part of the value's shape: adds it
    DORA_ROWS = "DoRA"  # left factor, right factor, magnitudes: adds the product, and sets the length of each row
    DORA_COLUMNS = "DoRA by column"  # the same, and sets the length of each column of a matrix


@functools.cache
def adapted(base: Decoder | None, parts: int, terms: tuple[Term, ...]) -> Decoder:
    """The decoder of a value with one or more adapters.

    Its parts are those of the base's value, then those of each term. Its parameters are those of `base`, and the scale
    of each term, named by `scale_name`. Magnitudes are accessed by ``BlockRows(1, columns)`` for rows, and by
    ``BlockRows(rows, 1)`` for columns.

    Args:
        base: decoder of the base's value; None if its only part is the value.
        parts: number of parts of the base's value.
        terms: what is added, in order. A DoRA term applies to the value with all terms before it.

    Tracing the decoder raises MethodError if DoRA by column is used for a stack of matrices.
    """
    reduces = base is not None and base.reduces

    def decode(t: Inputs, *given: Any, **parameters: float) -> Array:
        scales = [parameters.pop(scale_name(number)) for number in range(len(terms))]
        own = [t] if reduces else []
        value: Array = given[0] if base is None else base.function(*own, *given[:parts], **parameters)
        following = iter(given[parts:])
        for term, scale in zip(terms, scales, strict=True):
            value = _with_term(t, value, term, scale, following)
        return value

    names = ([] if base is None else [base.name]) + [term.value for term in terms]
    return Decoder(" + ".join(names), decode, reduces=True)


def scale_name(number: int) -> str:
    """The name of the parameter that is the scale of a term, by its number from 0 on."""
    return f"scale_{number}"


REPLACED = Decoder("replaced", lambda value: value)
"""A value that an adapter has its own copy of, in another dtype than the model's."""
REPLACED_ROWS = Decoder("replaced rows", lambda base, rows: -(-base - rows))
"""Rows of a second part instead of the base's, such as trained tokens. Each row is accessed by `GatheredRows` in one of
the two parts, and is -1 in the other. Negated, because ``-0.0 + 0.0`` would lose the sign of a zero."""


def _with_term(t: Inputs, value: Array, term: Term, scale: float, parts: Iterator[Any]) -> Array:
    added: Array = next(parts) if term is Term.BIAS else low_rank(next(parts), next(parts))
    value = value + scale * added
    if term not in (Term.DORA_ROWS, Term.DORA_COLUMNS):
        return value
    if term is Term.DORA_COLUMNS and len(t.shape) != 2:
        raise MethodError(f"DoRA by column takes a matrix, and not a tensor of shape {list(t.shape)}")
    magnitudes: Array = next(parts)
    sums = t.row_sum if term is Term.DORA_ROWS else t.column_sum
    return magnitudes / single(sqrt(sums(wide(value) * wide(value)))) * value
