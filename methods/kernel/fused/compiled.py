"""The compiled loops of a kernel: what each pass computes in which loop, and the memory that a thread needs for it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

from ..access import matrices
from ..expression import Node, Type, blocks_of
from ..kernel import Kernel
from ..random_streams import PERIOD
from ..reduction.reductions import ColumnSum, Count, Selection, StripSum, Sum
from ..spec import BLOCK, Unit, rows_of_blocks
from . import helpers
from .compiler import Library, library
from .helpers import COLUMNS
from .loops import SEGMENT, Generator, Loop
from .operations import DECLARATIONS, Types
from .stages import has_columns, in_loop, stages_of
from .staging.functions import fill_functions
from .staging.lines import bytes_of_column, line_functions
from .staging.state import fill_of, panel_elements
from .table import Target, Variant

_SAMPLE = 1 << 16
"""Elements of a sample, at most."""
_HISTOGRAM = 1 << 16
"""Bins of a histogram, at most."""


class Group:
    """The loops of one pass, or of its part that can be repeated.

    Args:
        name: name of the group.
        targets: what it computes.
        kernel: kernel.
        dtypes: dtype of each input.
        outs: dtype of each output.

    Attributes:
        stages: what the group computes in which loop.
        columns: elements of a row, if segments are rows or strips of rows; 0 if they are not.
        segment: elements of a segment; 0 for the complete range.
        rows: rows that it computes at a time, at most, if something is computed between the stages; 0 for all.
        lines: nodes with one value per block that have lines, by their ids.
        width: columns of the values with one number per column, repeated to at least a segment; 0 for none.
        direct: whether segments are the rows, or the strips, of the blocks of sums: the loop adds to their columns.
        fills: what is filled before the loop over a segment.
    """

    def __init__(
        self, name: str, targets: Sequence[Target], kernel: Kernel, dtypes: Sequence[str], outs: Sequence[str]
    ) -> None:
        self.name = name
        self.targets = tuple(targets)
        self._inputs, self._dtypes, self._outs = kernel.inputs, dtypes, outs
        wanted = [target.node for target in targets]
        self.stages = stages_of(wanted)
        by_row = any(stage.by_row for stage in self.stages)
        columns = max(1, kernel.inputs.columns)
        line = 0
        nodes = in_loop(wanted + [node for stage in self.stages for node in stage.wanted])
        self.fills = tuple(dict.fromkeys(fill for node in nodes if (fill := fill_of(node, kernel.inputs))))
        if has_columns(nodes):
            line = max(1, math.prod(kernel.inputs.shape[1:]))
        self.rows = max(1, BLOCK // columns) if by_row else 0
        self.lines = {id(node): node for stage in self.stages for node in (*stage.blocked, *stage.lined)}
        if self.lines:
            height = rows_of_blocks(kernel.inputs.shape, {blocks_of(node).rows for node in self.lines.values()})
            self.rows = height * max(1, BLOCK // (height * columns))
        self.columns = columns if kernel.unit is not Unit.ELEMENT and (by_row or line) else 0
        if self.columns:
            strips = self.lines and not line and not any(stage.of_rows for stage in self.stages)
            self.segment = min(COLUMNS, columns) if strips else columns
            self.width = max(line, columns) if line else 0  # a vector is a row, and one column
        else:
            self.width = line * max(1, SEGMENT // line) if line else 0
            reduces = any(target.reduction for target in targets)
            self.segment = self.width or (SEGMENT if reduces or self.fills else 0)
        sums = [target.reduction for target in targets if isinstance(target.reduction, Sum)]
        self.direct = not self.width and all(map(self._fits, sums))

    def _fits(self, reduction: Sum) -> bool:
        """Whether each segment is a row, or a strip, of a block of a sum."""
        if isinstance(reduction, StripSum):
            return self.segment == min(COLUMNS, self.columns)
        return self.segment == COLUMNS and reduction.block % COLUMNS == 0 and self.columns % COLUMNS == 0

    def ranges(self, element: int, elements: int) -> Iterator[tuple[int, int]]:
        """The first element and the number of elements of each range that is computed at a time.

        Ranges of blocks end where a matrix of a stack ends, because its last blocks can be partial.

        Args:
            element: index in the tensor of the first element.
            elements: number of elements.
        """
        columns, (_, height, _) = max(1, self._inputs.columns), matrices(self._inputs.shape)
        first = 0
        while first < elements:
            size = self.rows * columns or elements
            if self.lines:
                row = (element + first) // columns % height
                size = min(self.rows - row % self.rows, height - row) * columns
            yield first, min(size, elements - first)
            first += size

    def line_bytes(self, node: Node, rows: int) -> int:
        """The bytes of the lines of a node for a number of rows, the first of which is the first of a row of blocks."""
        size = bytes_of_column(node, Types("F64" in self._dtypes))
        return -(-rows // blocks_of(node).rows) * max(1, self._inputs.columns) * size

    @functools.cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The function of each stage."""
        long = self._inputs.rows * self._inputs.columns > PERIOD
        variant = Variant(self._inputs, tuple(self._dtypes), tuple(self._outs), long, self.direct)
        return tuple(
            Generator(f"{self.name}_{number}", stage, self.targets, variant).loop()
            for number, stage in enumerate(self.stages)
        )


class Compiled:
    """The compiled loops of a kernel for certain dtypes. Equal expressions share them; any thread may use them.

    Args:
        kernel: kernel.
        dtypes: dtype of each input by its name in a safetensors header.
        outs: dtype of each output by its name in a safetensors header.
    """

    def __init__(self, kernel: Kernel, dtypes: Sequence[str], *outs: str) -> None:
        self.kernel = kernel
        self.dtypes = tuple(dtypes)
        self.outs = outs
        self.wide = "F64" in self.dtypes
        self._library: Library | None = None

    @functools.cached_property
    def groups(self) -> dict[str, Group]:
        """The groups by name: ``output``, and for each level ``reduce_LEVEL`` and ``select_LEVEL``."""
        kernel = self.kernel
        targets: dict[str, list[Target]] = {}
        for number, node in enumerate(kernel.reduced):
            name = f"{'select' if isinstance(node.value, Selection) else 'reduce'}_{node.level}"
            targets.setdefault(name, []).append(Target(node.args[0], node.value, number))
        byproducts = enumerate(kernel.byproducts, len(kernel.reduced))
        targets["output"] = [Target(node, number=~number) for number, node in enumerate(kernel.outputs)]
        targets["output"] += [Target(node.args[0], node.value, number) for number, node in byproducts]
        return {name: Group(name, found, kernel, self.dtypes, self.outs) for name, found in targets.items()}

    # --- native code -------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Compile the loops, or load them from the cache directory. Done by the first use if it was not called."""
        if self._library is None:
            self._library = library(self.assembly, self._names)

    def function(self, name: str) -> Callable[[int], int]:
        """A loop's function: it takes the address of the loop's table."""
        self.prepare()
        assert self._library is not None
        return self._library.functions[name]

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(loop.name for group in self.groups.values() for loop in group.loops)

    @functools.cached_property
    def assembly(self) -> str:
        """The LLVM assembly of all loops with the helpers that they call."""
        loops = [loop for group in self.groups.values() for loop in group.loops]
        names = set().union(*(loop.helpers for loop in loops))
        return DECLARATIONS + "".join(_helpers(names)) + "".join(loop.text for loop in loops)

    # --- memory ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def scratch(self) -> int:
        """The size in bytes of the scratch memory that a thread needs for a chunk of any size."""
        return max(self._scratch(group) for group in self.groups.values())

    def _scratch(self, group: Group) -> int:
        size = 0

        def take(nbytes: int) -> int:
            nonlocal size
            size += aligned(nbytes)
            return 0

        Buffers(self, group, take)
        return size

    def cut_elements(self, selection: Selection) -> int:
        """The elements of which the block is computed again in which a selection ends, at most."""
        unit = self.kernel.height * max(1, self.kernel.inputs.columns)
        return BLOCK if self.kernel.unit is not Unit.BLOCK_ROW else selection.block + 2 * unit

    @property
    def allocated(self) -> int:
        """The bytes that a thread allocates besides, at most: numpy's temporaries and the results of a pass."""
        selections = [node.value for node in self.kernel.reduced if isinstance(node.value, Selection)]
        searches = sum(len(selection.targets) for selection in selections)
        rows = max((group.rows for group in self.groups.values()), default=0) * max(1, self.kernel.inputs.columns)
        ranked = any(stage.ranked for group in self.groups.values() for stage in group.stages)
        lists = 1 + 3 * any(group.fills for group in self.groups.values())
        sample = _SAMPLE * (8 * (lists + len(self.dtypes)) + 4 * len(selections)) if selections else 0
        cut = 5 * sum(self.cut_elements(selection) for selection in selections)
        return sample + cut + 3 * 8 * _HISTOGRAM * searches + (40 * rows if ranked else 0) + (64 << 10)


class Buffers:
    """The buffers of a group in the scratch memory of a thread: addresses by key, as in the tables of its loops.

    Args:
        compiled: compiled loops.
        group: group.
        take: function that takes a number of bytes from the scratch memory and returns their address.
    """

    def __init__(self, compiled: Compiled, group: Group, take: Callable[[int], int]) -> None:
        work = 8 if compiled.wide else 4
        inputs = compiled.kernel.inputs
        segment = group.segment or SEGMENT
        columns = max(1, inputs.columns)
        elements = group.rows * columns
        self.addresses: dict[tuple[object, ...], int] = {}
        self.totals: list[tuple[int, int, int]] = []
        """Address, number and bytes per element of the totals of each sum, which start as -0."""
        self.row_values: dict[int, int] = {}
        """Place of the first row's value of each node with one value per row."""
        for target in group.targets:
            reduction = target.reduction
            if reduction is None or isinstance(reduction, Count):
                continue
            size = 4 if isinstance(reduction, Selection) else 8 if target.node.type is Type.WIDE else work
            if not (group.direct and isinstance(reduction, Sum)):
                self.addresses["operand", target.number] = take(segment * size)
            if isinstance(reduction, (Sum, ColumnSum)):
                width = COLUMNS if isinstance(reduction, Sum) else reduction.width
                self.addresses["totals", target.number] = totals = take(width * size)
                self.totals.append((totals, width, size))
                self.addresses["wide", target.number] = take(COLUMNS * 8) if isinstance(reduction, Sum) else 0
        for fill in group.fills:
            self.addresses["filled", fill] = take(segment * work)
            if fill.kind in ("transposed", "low_rank"):
                self.addresses["panel", fill] = take(panel_elements(fill, inputs) * work)
        for key, node in group.lines.items():
            self.addresses["lines", key] = take(group.line_bytes(node, group.rows))
        for stage in group.stages:
            for node in stage.reduced:
                self.addresses["row operand", id(node)] = take(columns * 8)
            for node in stage.ranked:
                self.addresses["keys", id(node)] = take(elements * 8)
                self.addresses["ranks", id(node)] = take(elements * work)
            for node in (*stage.reduced, *stage.exported, *stage.called):
                self.row_values.setdefault(id(node), len(self.row_values) * group.rows)
        self.rows = take(len(self.row_values) * group.rows * 8)


def aligned(nbytes: int) -> int:
    """The number of bytes that a buffer takes from the scratch memory."""
    return -(-nbytes // 64) * 64


def _helpers(names: set[str]) -> Iterator[str]:
    """The assembly of the helpers with these names, and of those that they call, each once."""
    feeding = {name.rsplit("_", 1)[1] for name in names if name.startswith("sum_feed")}
    sums = sorted(feeding | {name.rsplit("_", 1)[1] for name in names if name.startswith("sum_advance")})
    adding = {"double"} if names & {"fold", "columns_feed_double"} or sums else set()
    for type in sorted(adding | feeding):
        yield helpers.add_into_function(type)
    if sums or "fold" in names:
        yield helpers.fold_function()
    for type in sums:
        yield helpers.sum_end_function(type) + helpers.advance_function(type)
        if type in feeding:
            yield helpers.feed_function("sum", type)
    if "columns_feed_double" in names:
        yield helpers.columns_end_function() + helpers.feed_function("columns", "double")
    if "select_feed" in names:
        yield helpers.selection_function()
    yield fill_functions({name for name in names if name.startswith("fill")})
    yield line_functions({name for name in names if name.startswith("block")})
    for name in sorted(names):
        if name.startswith("row_max"):
            yield helpers.row_max_function(name.removeprefix("row_max_"))
