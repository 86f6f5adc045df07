"""The decoder of matrices whose rows come from several tables, such as embeddings in the vocabulary of a merge.

Each part is a table of which some rows are used; the others are zeros (`GatheredRows`). A row comes from one table, or
is the mean of several, which are parts with their number as ``count``.

Sums are computed with the opposite sign: x + -0 is x for every number, while +0 + -0 would lose the sign of a zero. So
a row of one table keeps its bits.
"""

from __future__ import annotations

from functools import reduce
from operator import add

from ..kernel.array import Array
from ..kernel.decoder import Decoder


def _gathered(*tables: Array, **counts: float) -> Array:
    groups: dict[float, list[Array]] = {}
    for number, table in enumerate(tables):
        groups.setdefault(counts.get(f"count{number}", 1.0), []).append(-table)
    return -reduce(add, (reduce(add, negated) / count for count, negated in groups.items()))


GATHERED = Decoder("gathered rows", _gathered)
"""The sum of tables, of which those with the parameter ``count<number>`` are summed first, and divided by it."""
