"""Generates the loop over the elements of a segment, which is where all arithmetic is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..expression import Extent, Node, Type
from ..random_streams import STEP
from ..reduction.reductions import Count, Selection, Sum
from .assembly import Function, literal
from .formats import FORMATS, STORED, decoded, encoded
from .operations import Types, converted, hashed, operation, parameter, type_of_use, used_type
from .stages import Stage, given, in_loop
from .staging.lines import BITS, loaded
from .staging.state import fill_of
from .table import Table, Target, Variant


class Segment:
    """Writes the loop over the elements of a segment, as a function whose pointers do not overlap.

    Args:
        name: name of the function.
        stage: what the loop computes besides the targets.
        targets: targets to compute.
        table: table of the stage.
        variant: what the loops of the group have in common.
    """

    def __init__(self, name: str, stage: Stage, targets: Sequence[Target], table: Table, variant: Variant) -> None:
        self.name = name
        self.stage = stage
        self.targets = targets
        self.table = table
        self.variant = variant
        self.types = Types("F64" in variant.dtypes)
        self.pointers: dict[tuple[Any, ...], str] = {}
        self._values: dict[int, str] = {}
        self._hoisted: dict[tuple[str, int], str] = {}

    # --- the loop over a segment -------------------------------------------------------------------------------------

    def text(self) -> str:
        """The function: it computes all nodes for the elements of a segment, and stores the targets."""
        wanted = [target.node for target in self.targets] + self.stage.wanted
        nodes = [node for node in in_loop(wanted) if node.in_tile]
        for node in nodes:
            if fill := fill_of(node, self.variant.inputs):
                self._pointer("filled", fill)
            elif node.op == "load":
                self._pointer("input", node.value)
            if node.op == "row_rank" and given(node):
                self._pointer("ranks", id(node))
            if node.extent is Extent.BLOCK:
                self._pointer("lines", id(node))
            for arg in node.args:
                if arg.extent is Extent.COLUMN and not arg.constant:
                    self._pointer("columns", id(arg))
        for key in self._sinks():
            self._pointer(*key)
        arguments = [("ptr noalias", name) for name in self.pointers.values()]
        fixed = [("ptr noalias", "table"), ("ptr noalias", "numbers"), ("ptr noalias", "rows")]
        f = Function(
            self.name,
            "i32",
            [*fixed, *(("i64", name) for name in ("offset", "count", "row", "column")), *arguments],
        )
        self._first = f.value(f"add i64 {f.load('%table', self.table.place('element'), 'i64')}, %offset")
        for node in nodes:
            self._hoist(f, node)
        for node in (*self.stage.blocked, *(each for each in nodes if each.extent is Extent.BLOCK)):
            line = f.value(f"udiv i64 %row, {f.load('%table', self.table.place('block rows', id(node)), 'i64')}")
            first = f.value(f"mul i64 {line}, {f.load('%table', self.table.place('columns'), 'i64')}")
            self._hoisted["first of line", id(node)] = f.value(f"add i64 {first}, %column")
        for node in nodes:
            if node.extent is Extent.ROW:
                self._values[id(node)] = self._row_value(f, node)
        counts = [target for target in self.targets if isinstance(target.reduction, Count)]
        carried = [("i32", "0")] + [("i32", "0") for _ in counts]
        with f.loop("%count", carried=carried) as (i, before, after):
            for node in nodes:
                if node.extent is not Extent.ROW:
                    self._values[id(node)] = self._element_value(f, node, i)
            after.append(before[0])
            for target, total in zip(counts, before[1:], strict=True):
                flag = f.value(f"zext i1 {self._values[id(target.node)]} to i32")
                after.append(f.value(f"add i32 {total}, {flag}"))
            self._store_all(f, i, after)
        for target, total in zip(counts, after[1:], strict=True):
            pointer = f"%{self.pointers['count', target.number]}"
            added = f.value(f"add i64 {f.load(pointer, 0, 'i64')}, {f.value(f'zext i32 {total} to i64')}")
            f.store(added, pointer, 0, "i64")
        for node in self.stage.exported:
            value = converted(f, self._values[id(node)], self.types.of(node.type), "double")
            f.store(value, "%rows", self._row_index(f, node), "double")
        return f.text(f"i32 {after[0]}")

    def _sinks(self) -> list[tuple[Any, ...]]:
        """The keys of the pointers that the segment's function writes to."""
        keys: list[tuple[Any, ...]] = []
        for target in self.targets:
            keys.append((self._sink(target), target.number))
        keys += [("row operand", id(node)) for node in self.stage.reduced]
        keys += [("lines", id(node)) for node in self.stage.blocked]
        return keys + [("keys", id(node)) for node in self.stage.ranked]

    def _sink(self, target: Target) -> str:
        """The kind of the pointer through which a target is stored."""
        if target.reduction is None:
            return "output"
        if isinstance(target.reduction, Count):
            return "count"
        return "totals" if self.variant.direct and isinstance(target.reduction, Sum) else "operand"

    def _store_all(self, f: Function, i: str, carried: list[str]) -> None:
        for target in self.targets:
            value, reduction = self._values[id(target.node)], target.reduction
            if reduction is None:
                carried[0] = self._store_output(f, i, value, carried[0], target.number)
            elif isinstance(reduction, Selection):
                single = converted(f, value, self.types.of(target.node.type), "float")
                bits = f.value(f"bitcast float {single} to i32")
                f.store(bits, f"%{self.pointers['operand', target.number]}", i, "i32")
            elif not isinstance(reduction, Count):
                type, sink = self.types.of(target.node.type), self._sink(target)
                pointer = f"%{self.pointers[sink, target.number]}"
                if sink == "totals":
                    value = f.value(f"fadd {type} {f.load(pointer, i, type)}, {value}")
                f.store(value, pointer, i, type)
        for node in self.stage.reduced:
            value, type = self._values[id(node.args[0])], self.types.of(node.args[0].type)
            kept = "double" if node.op == "row_sum" else type
            f.store(converted(f, value, type, kept), f"%{self.pointers['row operand', id(node)]}", i, kept)
        for node in self.stage.ranked:
            self._store_key(f, i, node)
        for node in self.stage.blocked:
            self._store_maximum(f, i, node)

    def _store_output(self, f: Function, i: str, value: str, bad: str, number: int) -> str:
        """Store a rounded output element; return whether it or an earlier one is beyond the format's largest number."""
        name, type = self.variant.outs[~number], self.types.work
        form = FORMATS[name]
        place = f.value(f"add i64 %offset, {i}")
        f.store(encoded(f, value, type, name), f"%{self.pointers['output', number]}", place, form.stored)
        suffix = "f64" if type == "double" else "f32"
        size = f.value(f"call {type} @llvm.fabs.{suffix}({type} {value})")
        largest = min(form.maximum, FORMATS["F64" if type == "double" else "F32"].maximum)
        beyond = f.value(f"fcmp ugt {type} {size}, {literal(largest, type)}")
        return f.value(f"or i32 {bad}, {f.value(f'zext i1 {beyond} to i32')}")

    def _store_maximum(self, f: Function, i: str, node: Node) -> None:
        """Store the magnitude in the line of its block, if it is larger than those of its column so far."""
        type = self.types.of(node.type)
        pointer, place = f"%{self.pointers['lines', id(node)]}", self._place_in_line(f, node, i)
        bits = f.value(f"bitcast {type} {self._values[id(node.args[0])]} to {BITS[type]}")
        before = f.load(pointer, place, BITS[type])
        larger = f.value(f"icmp ugt {BITS[type]} {bits}, {before}")
        kept = f.value(f"select i1 {larger}, {BITS[type]} {bits}, {BITS[type]} {before}")
        f.store(kept, pointer, place, BITS[type])

    def _place_in_line(self, f: Function, node: Node, i: str) -> str:
        return f.value(f"add i64 {self._hoisted['first of line', id(node)]}, {i}")

    def _store_key(self, f: Function, i: str, node: Node) -> None:
        """Store a key that sorts like the magnitude, then the column; all NaNs are the largest magnitude."""
        single = converted(f, self._values[id(node.args[0])], self.types.of(node.args[0].type), "float")
        bits = f.value(f"bitcast float {single} to i32")
        nan = f.value(f"fcmp uno float {single}, {single}")
        wide = f.value(f"zext i32 {f.value(f'select i1 {nan}, i32 {0x7FC0_0000}, i32 {bits}')} to i64")
        key = f.value(f"or i64 {f.value(f'shl i64 {wide}, 32')}, {i}")
        f.store(key, f"%{self.pointers['keys', id(node)]}", f.value(f"add i64 %offset, {i}"), "i64")

    # --- values ------------------------------------------------------------------------------------------------------

    def _hoist(self, f: Function, node: Node) -> None:
        """Load what a node needs besides its operands before the loop."""
        if given(node):
            return
        for position, arg in enumerate(node.args):
            if not arg.in_tile and arg.extent is not Extent.COLUMN and arg.op != "threshold":
                place = self.table.parameter("number", arg)
                self._hoisted[f"{position}", id(node)] = parameter(f, place, type_of_use(node, arg, self.types))
        if node.op == "hash":
            for stream in ("", " of the second stream")[: 1 + self.variant.long]:
                # the segment's offset moves the hash of its first element
                start = f.load("%numbers", self.table.parameter("start" + stream, node), "i64")
                moved = f.value(f"add i64 {start}, {f.value(f'mul i64 %offset, {STEP}')}")
                self._hoisted["start" + stream, id(node)] = f.value(f"trunc i64 {moved} to i32")
                between = f.load("%numbers", self.table.parameter("between" + stream, node), "i64")
                self._hoisted["between" + stream, id(node)] = f.value(f"trunc i64 {between} to i32")
        if node.op == "selected":
            value = f.load("%numbers", self.table.parameter("threshold", node.args[1]), "double")
            self._hoisted["threshold", id(node)] = f.value(f"fptrunc double {value} to float")
            cut = f.load("%numbers", self.table.parameter("cut", node.args[1]), "i64")
            left = f.value(f"sub i64 {cut}, {self._first}")
            left = f.value(f"select i1 {f.value(f'icmp slt i64 {left}, 0')}, i64 0, i64 {left}")
            self._hoisted["cut", id(node)] = f.value(f"trunc i64 {f.smaller(left, '%count')} to i32")
        for arg in node.args:
            if arg.extent is Extent.COLUMN and not arg.constant and ("line", id(arg)) not in self._hoisted:
                width = f.load("%table", self.table.place("width"), "i64")
                self._hoisted["line", id(arg)] = f.value(f"urem i64 {self._first}, {width}")

    def _row_index(self, f: Function, node: Node) -> str:
        line = self.table.place("row value", id(node))
        first = f.load("%table", line, "i64")
        return f.value(f"add i64 {first}, %row")

    def _row_value(self, f: Function, node: Node) -> str:
        if given(node):
            value = f.load("%rows", self._row_index(f, node), "double")
            return converted(f, value, "double", self.types.of(node.type))
        return operation(f, node, self._args(f, node, ""), self.types)

    def _element_value(self, f: Function, node: Node, i: str) -> str:
        op = node.op
        if node.extent is Extent.BLOCK:
            place = self._place_in_line(f, node, i)
            return loaded(f, f"%{self.pointers['lines', id(node)]}", place, node, self.types)
        if fill := fill_of(node, self.variant.inputs):
            return f.load(f"%{self.pointers['filled', fill]}", i, self.types.work)
        if op == "load":
            name = self.variant.dtypes[node.value]
            pointer = f"%{self.pointers['input', node.value]}"
            raw = f.load(pointer, f.value(f"add i64 %offset, {i}"), STORED[name].stored)
            return converted(f, *decoded(f, raw, name), self.types.work)
        if op == "row_rank":
            pointer = f"%{self.pointers['ranks', id(node)]}"
            return f.load(pointer, f.value(f"add i64 %offset, {i}"), self.types.work)
        if op == "index":
            return f.value(f"add i64 {self._first}, {i}")
        if op == "hash":
            return self._hash(f, node, i)
        if op == "selected":
            return self._selected(f, node, i)
        return operation(f, node, self._args(f, node, i), self.types)

    def _hash(self, f: Function, node: Node, i: str) -> str:
        index = f.value(f"trunc i64 {i} to i32")
        start, between = (self._hoisted[name, id(node)] for name in ("start", "between"))
        if self.variant.long:
            place = f.value(f"lshr i64 {f.value(f'add i64 {self._first}, {i}')}, 32")
            first = f.value(f"lshr i64 {f.load('%table', self.table.place('element'), 'i64')}, 32")
            second = f.value(f"icmp ne i64 {place}, {first}")
            others = (self._hoisted[f"{name} of the second stream", id(node)] for name in ("start", "between"))
            start, between = (
                f.value(f"select i1 {second}, i32 {other}, i32 {own}")
                for own, other in zip((start, between), others, strict=True)
            )
        return hashed(f, index, start, between)

    def _selected(self, f: Function, node: Node, i: str) -> str:
        """Whether an element is above the threshold, or equal to it and before the element that ends the ties."""
        magnitude = converted(f, self._values[id(node.args[0])], self.types.of(node.args[0].type), "float")
        threshold = self._hoisted["threshold", id(node)]
        above = f.value(f"fcmp ogt float {magnitude}, {threshold}")
        equal = f.value(f"fcmp oeq float {magnitude}, {threshold}")
        index = f.value(f"trunc i64 {i} to i32")
        before = f.value(f"icmp slt i32 {index}, {self._hoisted['cut', id(node)]}")
        return f.value(f"or i1 {above}, {f.value(f'and i1 {equal}, {before}')}")

    def _args(self, f: Function, node: Node, i: str) -> list[str]:
        args = []
        for position, arg in enumerate(node.args):
            if arg.in_tile:
                args.append(self._values[id(arg)])
            elif arg.extent is Extent.COLUMN and not arg.constant:
                place = f.value(f"add i64 {self._hoisted['line', id(arg)]}, {i}")
                value = f.load(f"%{self.pointers['columns', id(arg)]}", place, "double")
                if arg.type is Type.FLAG:
                    args.append(f.value(f"fcmp une double {value}, {literal(0.0, 'double')}"))
                else:
                    args.append(converted(f, value, "double", used_type(node, self.types)))
            else:
                args.append(self._hoisted[f"{position}", id(node)])
        return args

    def _pointer(self, *key: Any) -> str:
        if key not in self.pointers:
            self.table.place(*key)
            self.pointers[key] = f"p{len(self.pointers)}"
        return self.pointers[key]
