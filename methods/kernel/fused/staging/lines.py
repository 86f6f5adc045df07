"""Generates what is computed for the blocks of a range of rows between two stages.

The values with one number per block are kept in lines. A line has one number for each column, and all columns of a
block have the same: a loop over the elements of a row loads them one after another. There is one line for each row of
blocks in the range.

A stage that finds the maxima of blocks collects in a line those of the columns. They are compared as integers, whose
order is that of magnitudes, with NaN as the largest. After the stage, `expand` puts the largest of each block into all
of its columns. `Lines` computes other values from these, for each column. `pick` rounds and stores one number of each
block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...expression import Node, Type, reachable
from ..assembly import Function, literal
from ..formats import FORMATS, encoded
from ..operations import Types, operation, parameter, type_of_use
from ..table import Table

BITS = {"float": "i32", "double": "i64"}
"""The integer types of magnitudes."""
_BYTES = {"float": 4, "double": 8, "i8": 1, "i64": 8}


def stored_type(node: Node, types: Types) -> str:
    """The LLVM type of a line's numbers."""
    return "i8" if node.type is Type.FLAG else types.of(node.type)


def bytes_of_column(node: Node, types: Types) -> int:
    """The bytes that a line takes for each column."""
    return _BYTES[stored_type(node, types)]


def loaded(f: Function, pointer: str, index: str, node: Node, types: Types) -> str:
    """A number of a line in the type of its node."""
    value = f.load(pointer, index, stored_type(node, types))
    return f.value(f"icmp ne i8 {value}, 0") if node.type is Type.FLAG else value


class Lines:
    """Writes the loop that computes lines from those of the maxima.

    Args:
        name: name of the function, which takes the numbers of the stage, the number of columns of all lines, and the
            addresses of `pointers`.
        nodes: nodes to compute, all with the same blocks.
        table: table of the stage.
        types: types of the kernel.
    """

    def __init__(self, name: str, nodes: Sequence[Node], table: Table, types: Types) -> None:
        self.name = name
        self._nodes = nodes
        self._order = [node for node in reachable(*nodes, in_tile=True, given=_is_maximum) if node.in_tile]
        self._table = table
        self._types = types
        given = [node for node in self._order if _is_maximum(node)]
        self.pointers: list[tuple[Any, ...]] = [("lines", id(node)) for node in (*given, *nodes)]

    def text(self) -> str:
        """The function."""
        pointers = {key[1]: f"p{number}" for number, key in enumerate(self.pointers)}
        arguments = [("ptr noalias", name) for name in pointers.values()]
        f = Function(self.name, "void", [("ptr noalias", "numbers"), ("i64", "count"), *arguments])
        hoisted = {
            (position, id(node)): parameter(
                f, self._table.parameter("number", arg), type_of_use(node, arg, self._types)
            )
            for node in self._order
            if not _is_maximum(node)
            for position, arg in enumerate(node.args)
            if not arg.in_tile
        }
        values: dict[int, str] = {}
        with f.loop("%count") as (i, _, _):
            for node in self._order:
                if _is_maximum(node):
                    values[id(node)] = loaded(f, f"%{pointers[id(node)]}", i, node, self._types)
                    continue
                args = [
                    values[id(arg)] if arg.in_tile else hoisted[position, id(node)]
                    for position, arg in enumerate(node.args)
                ]
                values[id(node)] = operation(f, node, args, self._types)
            for node in self._nodes:
                value, type = values[id(node)], stored_type(node, self._types)
                if node.type is Type.FLAG:
                    value = f.value(f"zext i1 {value} to i8")
                f.store(value, f"%{pointers[id(node)]}", i, type)
        return f.text()


def _is_maximum(node: Node) -> bool:
    return node.op == "block_max"


def expand_name(type: str) -> str:
    """The name of the function that `line_functions` writes to expand maxima of a type."""
    return f"block_expand.{type}"


def pick_name(work: str, dtype: str) -> str:
    """The name of the function that `line_functions` writes to store numbers of the work dtype."""
    return f"block_pick.{work}.{dtype}"


def line_functions(names: set[str]) -> str:
    """The assembly of functions with these names."""
    return "".join(_KINDS[name.split(".")[0]](name) for name in sorted(names))


def _expand(name: str) -> str:
    """``expand(lines, count, columns, width)``: the largest of each block of `width` columns for all of its columns."""
    type = BITS[name.split(".")[1]]
    f = Function(name, "void", [("ptr", "lines"), ("i64", "count"), ("i64", "columns"), ("i64", "width")])
    with f.loop("%count", "%columns") as (start, _, _), f.loop("%columns", "%width") as (column, _, _):
        size = f.smaller(f.value(f"sub i64 %columns, {column}"), "%width")
        block = f.at(f.at("%lines", start, type), column, type)
        with f.loop(size, carried=[(type, "0")]) as (i, (largest,), following):
            value = f.load(block, i, type)
            larger = f.value(f"icmp ugt {type} {value}, {largest}")
            following.append(f.value(f"select i1 {larger}, {type} {value}, {type} {largest}"))
        with f.loop(size) as (i, _, _):
            f.store(following[0], block, i, type)
    return f.text()


def _pick(name: str) -> str:
    """``pick(lines, out, count, columns, width) -> i32``: stores the number of each block, rounded once.

    Returns whether one is beyond the largest number of the format.
    """
    _, work, dtype = name.split(".")
    form = FORMATS[dtype]
    pointers = [("ptr noalias", "lines"), ("ptr noalias", "out")]
    f = Function(name, "i32", [*pointers, ("i64", "count"), ("i64", "columns"), ("i64", "width")])
    blocks = f.value(f"add i64 {f.value('sub i64 %columns, 1')}, %width")
    blocks = f.value(f"udiv i64 {blocks}, %width")
    with f.loop("%count", "%columns", [("i32", "0"), ("i64", "0")]) as (start, (bad, done), after):
        line, out = f.at("%lines", start, work), f.at("%out", done, form.stored)
        with f.loop(blocks, carried=[("i32", bad)]) as (i, (before,), following):
            value = f.load(line, f.value(f"mul i64 {i}, %width"), work)
            f.store(encoded(f, value, work, dtype), out, i, form.stored)
            size = f.value(f"call {work} @llvm.fabs.{'f64' if work == 'double' else 'f32'}({work} {value})")
            largest = min(form.maximum, FORMATS["F64" if work == "double" else "F32"].maximum)
            beyond = f.value(f"fcmp ugt {work} {size}, {literal(largest, work)}")
            following.append(f.value(f"or i32 {before}, {f.value(f'zext i1 {beyond} to i32')}"))
        after += [following[0], f.value(f"add i64 {done}, {blocks}")]
    return f.text(f"i32 {after[0]}")


_KINDS: Mapping[str, Callable[[str], str]] = {"block_expand": _expand, "block_pick": _pick}
