"""Indexes of rows as runs: equal to the list of rows, with one hash."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeloom.methods.kernel.access.row_index import RowIndex

ROWS = st.lists(st.integers(-1, 6), max_size=40)


@given(ROWS, st.data())
def test_runs_are_the_rows(rows: list[int], data: st.DataObject) -> None:
    index = RowIndex(rows)
    assert list(index) == rows
    assert (len(index), index.highest) == (len(rows), max(rows, default=-1))
    begin = data.draw(st.integers(0, len(rows)))
    end = data.draw(st.integers(begin, len(rows)))
    found: list[int] = []
    for first, source, length in index.runs(begin, end):
        assert first == begin + len(found)
        assert length > 0
        found += [-1] * length if source < 0 else range(source, source + length)
    assert found == rows[begin:end]


@given(ROWS, ROWS)
def test_equality_and_hash_are_those_of_the_rows(one: list[int], other: list[int]) -> None:
    assert (RowIndex(one) == RowIndex(other)) == (one == other)
    assert hash(RowIndex(one)) == hash(RowIndex(list(one)))
    assert RowIndex(one).digest == RowIndex(tuple(one)).digest


def test_runs_are_as_few_as_possible() -> None:
    assert list(RowIndex([0, 1, 2, -1, -1, 5, 6, 6]).runs()) == [(0, 0, 3), (3, -1, 2), (5, 5, 2), (7, 6, 1)]
    assert "128,256 rows in 1 runs" in repr(RowIndex(range(128_256)))


def test_a_row_below_the_one_for_zeros_is_an_error() -> None:
    with pytest.raises(ValueError, match="row 1 of an index is -2"):
        RowIndex([0, -2])
