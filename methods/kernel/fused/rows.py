"""What Python computes between two stages: functions of the sums of rows, and ranks in rows."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..expression import Node
from ..kernel import State
from .compiled import Buffers
from .loops import Loop


def array_at(address: int, count: int, dtype: Any) -> Any:
    """The numbers at an address as a flat array, which does not own them."""
    nbytes = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype)


def address(data: Any) -> int:
    """The address of a buffer's first byte."""
    return int(np.frombuffer(data, np.uint8).ctypes.data)


class RowFunctions:
    """Evaluates what is between the stages of a group.

    Args:
        buffers: buffers of the group.
        state: state after the passes before this one.
        columns: elements of a row.
        work: dtype of ranks: float64 or float32.
    """

    def __init__(self, buffers: Buffers, state: State | None, columns: int, work: Any) -> None:
        self._buffers = buffers
        self._state = state
        self._columns = columns
        self._work = work
        self._results: dict[int, list[Any]] = {}

    def before(self, loop: Loop, rows: int) -> None:
        """Evaluate the functions whose results a stage uses."""
        for node in loop.stage.called:
            results = self._called(node, rows) if node.op == "host" else self._items(node)
            if not isinstance(results[0], (list, tuple)) and all(isinstance(each, (int, float)) for each in results):
                with np.errstate(over="ignore"):
                    values = np.array(results, np.float64).astype(np.float32).astype(np.float64)
                self._row_values(node, rows)[:] = values
            self._results[id(node)] = results

    def after(self, loop: Loop, rows: int) -> None:
        """Rank the keys that a stage has written: a key holds the magnitude and, in its low half, the column."""
        count = rows * self._columns
        for node in loop.stage.ranked:
            keys = array_at(self._buffers.addresses["keys", id(node)], count, np.int64).reshape(rows, self._columns)
            ranks = array_at(self._buffers.addresses["ranks", id(node)], count, self._work).reshape(rows, self._columns)
            keys.sort(axis=1)  # keys are unique, so any sort is stable
            keys &= (1 << 32) - 1
            places = np.arange(self._columns, dtype=self._work)
            np.put_along_axis(ranks, keys, np.broadcast_to(places, ranks.shape), axis=1)

    def _called(self, node: Node, rows: int) -> list[Any]:
        call = node.value
        leaves = [self._leaf(leaf, rows) for leaf in call.leaves]
        return [call(row) for row in zip(*leaves, strict=True)]

    def _items(self, node: Node) -> list[Any]:
        results = self._results[id(node.args[0])]
        return [each if isinstance(each, float) else each[node.value] for each in results]

    def _leaf(self, leaf: Node, rows: int) -> Sequence[Any]:
        """The value of a leaf for each row. Those of functions are rounded to float32."""
        if not leaf.in_tile:
            if leaf.constant:
                return [leaf.value] * rows
            assert self._state is not None
            return [self._state.scalars[id(leaf)]] * rows
        if id(leaf) in self._results:
            with np.errstate(over="ignore"):
                rounded: list[Any] = np.array(self._results[id(leaf)], np.float64).astype(np.float32).tolist()
            return rounded
        values: list[Any] = self._row_values(leaf, rows).tolist()
        return values

    def _row_values(self, node: Node, rows: int) -> Any:
        place = self._buffers.row_values[id(node)]
        return array_at(self._buffers.rows + 8 * place, rows, np.float64)
