"""Runs the loops of a group on one chunk: fills their tables, and collects the partial results of reductions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..expression import Node, blocks_of
from ..kernel import State
from ..random_streams import STEP, streams
from ..reduction.reductions import ColumnSum, Count, Selection, StripSum, Sum
from ..reduction.selection import Counts, Search, start
from .compiled import Buffers, Compiled, Group, aligned
from .formats import FORMATS, STORED
from .helpers import COLUMNS, SearchField, SumField
from .loops import Loop
from .rows import RowFunctions, address, array_at
from .staging.state import gather, run_lengths, state_of
from .table import Target


class Chunk(NamedTuple):
    """The same range of elements of every input.

    Args:
        inputs: bytes of each input in its stored dtype.
        element: index of the first element in the tensor, a multiple of the kernel's alignment.
        elements: number of elements.
        key: 64-bit random key of the output tensor.
        positions: position in the recipe of each input's model.
        staged: for each input, the first element and the number of elements of the range that it is staged for, which
            contains the chunk; empty if that is the chunk. Aligned inputs are always staged for the chunk.
        indices: index of each element in the tensor, int64, ascending, if they are not consecutive.
    """

    inputs: Sequence[Any]
    element: int
    elements: int
    key: int
    positions: Sequence[int]
    staged: Sequence[tuple[int, int]] = ()
    indices: Any = None


class Run:
    """The loops of a group on one chunk.

    Attributes:
        addresses: address of each input and buffer by key, as in the tables of the loops.
    """

    def __init__(
        self,
        compiled: Compiled,
        group: Group,
        chunk: Chunk,
        state: State | None,
        scratch: Any,
        active: Sequence[int],
        cut: Callable[[Node, Chunk], int],
    ) -> None:
        self.group = group
        self._compiled, self._chunk, self._state = compiled, chunk, state
        self._keep: list[Any] = []  # arrays whose addresses the tables hold
        self._numbers = [self._parameters(loop, cut) for loop in group.loops]
        base, used = address(scratch), 0

        def take(nbytes: int) -> int:
            nonlocal used
            used += aligned(nbytes)
            return base + used - aligned(nbytes)

        self._buffers = Buffers(compiled, group, take)
        if used > compiled.scratch or used > memoryview(scratch).nbytes:
            raise MemoryError(f"a kernel needs more scratch memory than it declares: {used} bytes")
        self.addresses: dict[tuple[object, ...], int] = dict(self._buffers.addresses)
        inputs = [address(data) for data in chunk.inputs]
        self.addresses.update({("input", number): each for number, each in enumerate(inputs)})
        self._prepare_fills(inputs)
        for start_address, count, size in self._buffers.totals:
            array_at(start_address, count, np.float64 if size == 8 else np.float32).fill(-0.0)
        self._results: dict[int, Any] = {}
        self._states: dict[int, Any] = {}
        for target in group.targets:
            if target.reduction is not None:
                self._prepare(target, target.number in active)

    def _prepare_fills(self, inputs: Sequence[int]) -> None:
        """Make the states of the fills."""
        chunk = self._chunk
        staged = chunk.staged or [(chunk.element, chunk.elements)] * len(inputs)
        runs = run_lengths(chunk.indices) if self.group.fills and chunk.indices is not None else None
        for fill in self.group.fills:
            spec, panel = self._compiled.kernel.inputs, self.addresses.get(("panel", fill), 0)
            state = state_of(fill, spec, inputs, panel, (chunk.element, chunk.elements), staged)
            if runs is not None:
                gather(state, chunk.indices, runs)
            self._keep += [state, runs]
            self.addresses["fill", fill] = state.ctypes.data

    # --- the reductions ----------------------------------------------------------------------------------------------

    def _prepare(self, target: Target, active: bool) -> None:
        """Make the state of a reduction, which the loops update."""
        reduction, number = target.reduction, target.number
        if isinstance(reduction, Count):
            counted = self._results[number] = np.zeros(1, np.int64)
            self.addresses["count", number] = counted.ctypes.data
        elif isinstance(reduction, (Sum, ColumnSum)):
            width = reduction.width if isinstance(reduction, ColumnSum) else COLUMNS
            if isinstance(reduction, StripSum):
                width = min(width, max(1, self._compiled.kernel.inputs.columns))
            blocks = self._chunk.elements // reduction.block + 1
            results = np.empty(blocks * (1 if isinstance(reduction, Sum) else width), np.float64)
            state = np.zeros(len(SumField), np.int64)
            state[SumField.TOTALS] = self.addresses["totals", number]
            state[SumField.WIDTH], state[SumField.BLOCK] = width, reduction.block
            state[SumField.RESULTS] = results.ctypes.data
            state[SumField.WIDE] = self.addresses["wide", number]
            self._results[number], self._states[number] = results, state
            self.addresses["state", number] = state.ctypes.data
        elif isinstance(reduction, Selection):
            self._prepare_searches(number, reduction, active)

    def _prepare_searches(self, number: int, selection: Selection, active: bool) -> None:
        """Make the states of the searches that continue; equal ones share their counts."""
        found: dict[tuple[object, ...], Any] = {}
        blocks = -(-self._chunk.elements // selection.block)
        for search in self._searches(number, selection) if active else ():
            if search.threshold is not None or search.query_key in found:
                continue
            state = np.zeros(len(SearchField), np.int64)
            histogram, equal = np.zeros(search.bins, np.int64), np.zeros(blocks, np.int64)
            for field in ("low", "high", "shift", "guess"):
                state[SearchField[field.upper()]] = getattr(search, field)
            state[SearchField.BLOCK] = selection.block
            state[SearchField.HISTOGRAM] = histogram.ctypes.data if search.bins else 0
            state[SearchField.EQUAL] = equal.ctypes.data
            found[search.query_key] = (state, histogram, equal)
        pointers = np.array([state.ctypes.data for state, _, _ in found.values()], np.int64)
        self._results[number] = found
        self._keep.append(pointers)
        self.addresses["state", number] = pointers.ctypes.data
        self.addresses["searches", number] = len(found)

    def _searches(self, number: int, selection: Selection) -> Sequence[Search]:
        state = None if self._state is None else self._state.reductions[number]
        return (state or start(selection.targets)).searches

    def result(self, number: int) -> Any:
        """The partial result of a reduction."""
        reduction, found = self._compiled.kernel.reduce_nodes[number].value, self._results[number]
        if isinstance(reduction, Count):
            return int(found[0])
        if isinstance(reduction, (Sum, ColumnSum)):
            count = int(self._states[number][SumField.COUNT])
            if isinstance(reduction, Sum):
                return found[:count].tolist()
            return list(found[: count * reduction.width].reshape(count, reduction.width))
        searches = self._searches(number, reduction)
        return [None if search.threshold else _counts(search, found[search.query_key]) for search in searches]

    # --- parameters --------------------------------------------------------------------------------------------------

    def _parameters(self, loop: Loop, cut: Any) -> Any:
        """The numbers of a loop: constants, scalars, thresholds and the start of random numbers."""
        numbers = np.zeros(max(1, len(loop.table.parameters)), np.float64)
        integers = numbers.view(np.int64)
        for place, (kind, node) in enumerate(loop.table.parameters):
            if kind == "number":
                numbers[place] = _as_operand(node, self._state)
            elif kind == "threshold":
                numbers[place] = self._scalar(node).value
            elif kind == "cut":
                integers[place] = cut(node, self._chunk)
        return numbers

    def _set_streams(self, loop: Loop, numbers: Any, first: int, count: int) -> None:
        """Set the start of the random numbers of a range."""
        integers = numbers.view(np.int64)
        for place, (kind, node) in enumerate(loop.table.parameters):
            if not kind.startswith(("start", "between")):
                continue
            index, stream = node.value
            key, position = stream or (self._chunk.key, self._chunk.positions[index])
            found = list(streams(key, position, first, count))
            each = found[-1] if kind.endswith("second stream") else found[0]
            # the hash of an element of the second stream is counted from the first element of the range
            start_at = each.start - each.part.start * STEP
            integers[place] = (start_at if kind.startswith("start") else each.between) & 0xFFFF_FFFF

    def _scalar(self, node: Node) -> Any:
        assert self._state is not None
        return self._state.scalars[id(node)]

    # --- the loops ---------------------------------------------------------------------------------------------------

    def compute(self, *, keep: bool = False) -> bool:
        """Run the loops; return whether an output value is beyond the largest number.

        Args:
            keep: whether the operands of all elements are kept, in buffers that the caller has set.
        """
        group, chunk = self.group, self._chunk
        columns = max(1, self._compiled.kernel.inputs.columns)
        ranges: Iterable[tuple[int, int]] = group.ranges(chunk.element, chunk.elements)
        if keep and not group.lines and (group.rows or group.width or group.fills):
            step = group.segment
            ranges = ((first, min(step, chunk.elements - first)) for first in range(0, chunk.elements, step))
        rows = RowFunctions(self._buffers, self._state, columns, np.float64 if self._compiled.wide else np.float32)
        beyond = False
        for first, size in ranges:
            for loop, numbers in zip(group.loops, self._numbers, strict=True):
                rows.before(loop, size // columns)
                for node in loop.stage.blocked:
                    array_at(self.addresses["lines", id(node)], group.line_bytes(node, size // columns), np.uint8)[
                        :
                    ] = 0
                if keep and group.lines and loop is group.loops[-1]:
                    for row in range(size // columns):
                        beyond |= self._call(loop, numbers, first + row * columns, columns, keep, row)
                else:
                    beyond |= self._call(loop, numbers, first, size, keep and not group.lines)
                rows.after(loop, size // columns)
        return beyond

    def _call(self, loop: Loop, numbers: Any, first: int, size: int, keep: bool, row: int = 0) -> bool:
        """Call a loop for a range, which starts at a row of the range that the lines are for."""
        self._set_streams(loop, numbers, self._chunk.element + first, size)
        fixed = {
            "element": self._chunk.element + first,
            "elements": size,
            "last": first + size == self._chunk.elements,
            "segment": max(1, size if keep else self.group.segment or size),
            "columns": max(1, self.group.columns or size),
            "numbers": numbers.ctypes.data,
            "rows": self._buffers.rows + 8 * row,
            "width": max(1, self.group.width),
        }
        table = np.zeros(len(loop.table.places), np.int64)
        for key, place in loop.table.places.items():
            table[place] = fixed[key[0]] if len(key) == 1 else self._place(key, first, keep, row)
        return bool(self._compiled.function(loop.name)(table.ctypes.data))

    def _place(self, key: tuple[Any, ...], first: int, keep: bool, row: int) -> int:
        """The entry of a table for a range that starts at element `first` of the chunk."""
        if key[0] == "row value":
            return self._buffers.row_values[key[1]]
        if key[0] == "columns":
            return self._columns(key[1])
        if key[0] in ("block rows", "block columns"):
            blocks = blocks_of(self.group.lines[key[1]])
            return blocks.rows if key[0] == "block rows" else blocks.columns
        moved = 0
        if key[0] == "input":
            moved = first * STORED[self._compiled.dtypes[key[1]]].bits // 8
        elif key[0] == "output":
            kernel, chunk = self._compiled.kernel, self._chunk
            begin, _ = kernel.written(~key[1], chunk.element, 1)
            place, _ = kernel.written(~key[1], chunk.element + first, 1)
            moved = (place - begin) * FORMATS[self._compiled.outs[~key[1]]].bits // 8
        elif key[0] == "lines":
            node = self.group.lines[key[1]]
            moved = self.group.line_bytes(node, row // blocks_of(node).rows * blocks_of(node).rows)
        elif key[0] == "ranks":
            moved = row * max(1, self._compiled.kernel.inputs.columns) * (8 if self._compiled.wide else 4)
        elif key[0] == "operand" and keep:
            moved = first * 4
        return self.addresses[key] + moved

    def _columns(self, node: int) -> int:
        """The address of the values of a node with one number per column, repeated to the group's width, twice."""
        key = ("columns", node)
        if key not in self.addresses:
            assert self._state is not None
            values = np.array(self._state.scalars[node], np.float64)
            with np.errstate(over="ignore"):
                values = values.astype(np.float32).astype(np.float64)
            repeated = np.tile(values, 2 * max(1, self.group.width // len(values)))
            self._keep.append(repeated)
            self.addresses[key] = repeated.ctypes.data
        return self.addresses[key]


def _as_operand(node: Node, state: State | None) -> float:
    """A constant, or a scalar rounded to float32, as float64; a flag is 0 or 1."""
    if node.constant:
        return float(node.value)
    assert state is not None
    with np.errstate(over="ignore"):
        return float(np.float32(state.scalars[id(node)]))


def _counts(search: Search, found: Any) -> Counts:
    """What a search has counted."""
    state, histogram, equal = found
    positive, above, above_guess = (
        int(state[field]) for field in (SearchField.POSITIVE, SearchField.ABOVE, SearchField.ABOVE_GUESS)
    )
    inside = histogram if search.bins else None
    return Counts(positive if search.rank is None else 0, above, inside, above_guess, tuple(equal.tolist()))
