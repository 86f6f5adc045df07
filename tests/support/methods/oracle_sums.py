"""Sums of the oracle: within a block in a fixed order, and over blocks exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tests.support.methods.oracle_numbers import Numbers

COLUMNS = 1 << 11
"""Columns of a block that remain to be added in float64."""


def folded(values: Numbers) -> Numbers:
    """Add the second half of the last dimension to the first, until one column remains."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        first, middle, second = np.split(values, [half, values.shape[-1] - half], axis=-1)
        values = np.concatenate([first + second, middle], axis=-1)
    return values


def block_sum(values: Numbers) -> float:
    """The sum of a block: rows are added in order, then the columns in float64. The last row can be incomplete."""
    columns = values[:COLUMNS].copy()
    for start in range(COLUMNS, len(values), COLUMNS):
        row = values[start : start + COLUMNS]
        columns[: len(row)] += row
    return float(folded(columns.astype(np.float64))[0])


def strip_sum(rows: Numbers) -> float:
    """The sum of complete rows: strips of each row are added in order, then the columns in float64."""
    columns = np.zeros(min(COLUMNS, rows.shape[1]), rows.dtype)
    for row in rows:
        for start in range(0, len(row), COLUMNS):
            strip = row[start : start + COLUMNS]
            columns[: len(strip)] += strip
    return float(folded(columns.astype(np.float64))[0])


def total(sums: Sequence[float]) -> float:
    """The exact sum, rounded once; NaN if a summand is NaN or if infinities cancel."""
    try:
        return math.fsum(sums)
    except (OverflowError, ValueError):
        return math.nan
