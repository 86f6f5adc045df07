"""Generates the loops of a pass: for each stage, one function that computes all nodes for a range of elements.

A stage's function gets one argument, the address of its table: an array of i64 numbers and addresses. `Table` assigns
the places, and the caller fills them. The range is divided into segments: rows, lines of columns, or parts that stay in
the first-level cache. The loops over a segment are functions of their own, whose pointers do not overlap, so LLVM
vectorizes them without checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..expression import Extent, Node, blocks_of
from ..reduction.reductions import ColumnSum, Count, StripSum, Sum
from .assembly import Function
from .helpers import COLUMNS, SumField
from .operations import Types
from .segment import Segment
from .stages import Stage
from .staging.lines import Lines, expand_name, pick_name
from .staging.state import Fill
from .table import Table, Target, Variant

SEGMENT = 1 << 11
"""Elements of a segment, except for rows and lines of columns: a few such buffers fit the first-level cache."""
_TARGETS = 16
"""Targets that one loop computes: LLVM's time grows with the square of their number."""


@dataclass(slots=True)
class Loop:
    """The function of one stage.

    Args:
        name: its name.
        stage: what it computes.
        table: places in its table.
        text: LLVM assembly.
        helpers: names of the helpers that it calls.
    """

    name: str
    stage: Stage
    table: Table
    text: str
    helpers: set[str] = field(default_factory=set)


class Generator:
    """Writes the function of one stage.

    Args:
        name: name of the function.
        stage: what the stage computes.
        targets: targets of the pass; used by its last stage.
        variant: what the loops of the group have in common.
    """

    def __init__(self, name: str, stage: Stage, targets: Sequence[Target], variant: Variant) -> None:
        self.name = name
        self.stage = stage
        found = list(targets) if stage.targets else []
        self.targets = [target for target in found if target.node.extent is not Extent.BLOCK]
        self.picked = [target for target in found if target.node.extent is Extent.BLOCK]
        self.table = Table()
        self.helpers: set[str] = set()
        self._types = Types("F64" in variant.dtypes)
        self._variant = variant

    def loop(self) -> Loop:
        """The function of the stage, with the functions that it calls before it."""
        segments, lines = self._segments(), self._lines()
        functions = [each.text() for each in lines] + [each.text() for each in segments]
        text = "".join(functions) + self._range(segments, lines)
        return Loop(self.name, self.stage, self.table, text, self.helpers)

    def _segments(self) -> list[Segment]:
        """The loops over a segment. The first one also computes what is not a target."""
        parts = [self.targets[start : start + _TARGETS] for start in range(0, len(self.targets), _TARGETS)]
        return [
            Segment(f"{self.name}_segment{number}", Stage() if number else self.stage, part, self.table, self._variant)
            for number, part in enumerate(parts or [[]])
        ]

    def _lines(self) -> list[Lines]:
        """The loops over the lines of the blocks of each size."""
        sizes = dict.fromkeys(blocks_of(node) for node in self.stage.lined)
        groups = [[node for node in self.stage.lined if blocks_of(node) == size] for size in sizes]
        return [
            Lines(f"{self.name}_lines{number}", nodes, self.table, self._types) for number, nodes in enumerate(groups)
        ]

    def _range(self, segments: Sequence[Segment], lines: Sequence[Lines]) -> str:
        """Compute all segments of a range, and reduce what each one has stored; returns whether a value is beyond."""
        f = Function(self.name, "i32", [("ptr", "table")], exported=True)
        count, segment, columns = (
            f.load("%table", self.table.place(name), "i64") for name in ("elements", "segment", "columns")
        )
        numbers, rows = (f.load("%table", self.table.place(name), "ptr") for name in ("numbers", "rows"))
        keys = dict.fromkeys(key for each in segments for key in each.pointers)
        passed = {key: f.load("%table", self.table.places[key], "ptr") for key in keys}
        for line in lines:
            given = ", ".join(f"ptr {f.load('%table', self.table.place(*key), 'ptr')}" for key in line.pointers)
            cells = self._cells(f, line.pointers[0][1], count, columns)
            f.do(f"call void @{line.name}(ptr {numbers}, i64 {cells}, {given})")
        first = "0"
        for target in self.picked:
            first = f.value(f"or i32 {first}, {self._pick(f, target, count, columns)}")
        step: list[str] = []
        with f.loop(count, step, [("i32", first)]) as (offset, (beyond,), following):
            size = f.smaller(f.value(f"sub i64 {count}, {offset}"), segment)
            row = f.value(f"udiv i64 {offset}, {columns}")
            column = f.value(f"urem i64 {offset}, {columns}")
            size = f.smaller(size, f.value(f"sub i64 {columns}, {column}"))
            step.append(size)
            for key in keys:
                if key[0] == "filled":
                    self._fill(f, key[1], passed[key], offset, size)
            fixed = f"ptr %table, ptr {numbers}, ptr {rows}, i64 {offset}, i64 {size}, i64 {row}, i64 {column}"
            for each in segments:
                pointers = ", ".join([fixed, *(f"ptr {passed[key]}" for key in each.pointers)])
                result = f.value(f"call i32 @{each.name}({pointers})")
                beyond = f.value(f"or i32 {beyond}, {result}")
            following.append(beyond)
            for target in self.targets:
                self._reduce(f, target, passed, size)
            for node in self.stage.reduced:
                self._reduce_row(f, node, passed, rows, row, size)
        for node in self.stage.blocked:
            expand = expand_name(self._types.of(node.type))
            self.helpers.add(expand)
            cells, width = self._cells(f, id(node), count, columns), self._block_columns(f, node)
            f.do(f"call void @{expand}(ptr {passed['lines', id(node)]}, i64 {cells}, i64 {columns}, i64 {width})")
        sums = [(target, name) for target in self.targets if (name := self._sum_name(target)) is not None]
        if sums:  # a block can continue in the next range of rows
            with f.when(f.value(f"icmp ne i64 {f.load('%table', self.table.place('last'), 'i64')}, 0")):
                for target, name in sums:
                    f.do(f"call void @{name.replace('feed', 'end')}(ptr {self._state(f, target)})")
        return f.text(f"i32 {following[0]}")

    def _cells(self, f: Function, node: int, count: str, columns: str) -> str:
        """The number of columns of all lines of a node: a line for each row of blocks that the range has rows of."""
        height = f.load("%table", self.table.place("block rows", node), "i64")
        below = f.value(f"add i64 {f.value(f'udiv i64 {count}, {columns}')}, {f.value(f'sub i64 {height}, 1')}")
        return f.value(f"mul i64 {f.value(f'udiv i64 {below}, {height}')}, {columns}")

    def _block_columns(self, f: Function, node: Node) -> str:
        return f.load("%table", self.table.place("block columns", id(node)), "i64")

    def _pick(self, f: Function, target: Target, count: str, columns: str) -> str:
        """Store an output with one element per block; returns whether one is beyond the format's largest number."""
        name = pick_name(self._types.work, self._variant.outs[~target.number])
        self.helpers.add(name)
        lines, out = (
            f.load("%table", self.table.place(*key), "ptr")
            for key in (("lines", id(target.node)), ("output", target.number))
        )
        cells, width = self._cells(f, id(target.node), count, columns), self._block_columns(f, target.node)
        return f.value(f"call i32 @{name}(ptr {lines}, ptr {out}, i64 {cells}, i64 {columns}, i64 {width})")

    def _fill(self, f: Function, fill: Fill, buffer: str, offset: str, size: str) -> None:
        """Fill a buffer with the values for the elements of a segment."""
        name = fill.function(self._variant.dtypes, self._types.work)
        self.helpers.add(name)
        state = f.load("%table", self.table.place("fill", fill), "ptr")
        first = f.value(f"add i64 {f.load('%table', self.table.place('element'), 'i64')}, {offset}")
        f.do(f"call void @{name}(ptr {state}, ptr {buffer}, i64 {first}, i64 {size})")

    def _sum_name(self, target: Target) -> str | None:
        if isinstance(target.reduction, Sum):
            return f"sum_feed_{self._types.of(target.node.type)}"
        return "columns_feed_double" if isinstance(target.reduction, ColumnSum) else None

    def _state(self, f: Function, target: Target) -> str:
        return f.load("%table", self.table.place("state", target.number), "ptr")

    def _reduce(self, f: Function, target: Target, passed: dict[tuple[Any, ...], str], size: str) -> None:
        """Reduce the operand of a segment."""
        if isinstance(target.reduction, (Count, type(None))):
            return
        if self._variant.direct and isinstance(target.reduction, Sum):
            advance = f"sum_advance_{self._types.of(target.node.type)}"
            self.helpers.add(advance)
            f.do(f"call void @{advance}(ptr {self._state(f, target)}, i64 {size})")
            return
        operand = passed["operand", target.number]
        if isinstance(target.reduction, StripSum):
            self._feed_strips(f, target, operand, size)
            return
        if (name := self._sum_name(target)) is not None:
            self.helpers.add(name)
            f.do(f"call void @{name}(ptr {self._state(f, target)}, ptr {operand}, i64 {size})")
            return
        # the searches of a selection: addresses of their states, one after the other
        self.helpers.add("select_feed")
        searches = f.load("%table", self.table.place("searches", target.number), "i64")
        states = self._state(f, target)
        with f.loop(searches) as (i, _, _):
            f.do(f"call void @select_feed(ptr {f.load(states, i, 'ptr')}, ptr {operand}, i64 {size})")

    def _feed_strips(self, f: Function, target: Target, operand: str, size: str) -> None:
        """Add the strips of a row to the totals."""
        type = self._types.of(target.node.type)
        add, advance = f"add_into_{type}", f"sum_advance_{type}"
        self.helpers.update((f"sum_feed_{type}", advance))
        totals = f.load(self._state(f, target), SumField.TOTALS, "ptr")
        with f.loop(size, COLUMNS) as (start, _, _):
            strip = f.smaller(f.value(f"sub i64 {size}, {start}"), str(COLUMNS))
            f.do(f"call void @{add}(ptr {totals}, ptr {f.at(operand, start, type)}, i64 {strip})")
            f.do(f"call void @{advance}(ptr {self._state(f, target)}, i64 {strip})")

    def _reduce_row(
        self, f: Function, node: Node, passed: dict[tuple[Any, ...], str], rows: str, row: str, size: str
    ) -> None:
        operand = passed["row operand", id(node)]
        name = "fold" if node.op == "row_sum" else f"row_max_{self._types.of(node.args[0].type)}"
        self.helpers.add(name)
        value = f.value(f"call double @{name}(ptr {operand}, i64 {size})")
        place = f.load("%table", self.table.place("row value", id(node)), "i64")
        f.store(value, rows, f.value(f"add i64 {place}, {row}"), "double")
