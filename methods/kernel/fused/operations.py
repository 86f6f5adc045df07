"""The operations of expression graphs in LLVM assembly, each rounded separately.

No instruction has a fast-math flag, so LLVM neither contracts a multiplication and an addition nor reorders sums.
Choices are selections without branches, which LLVM vectorizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..arithmetic import COMPARISONS
from ..expression import Node, Type
from ..random_streams import FIRST, SECOND, STEP
from .assembly import Function, literal
from .formats import nearest

_PREDICATES = {"gt": "ogt", "ge": "oge", "lt": "olt", "le": "ole", "eq": "oeq", "ne": "une"}
_ARITHMETIC = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
_INTEGER = {"iadd": "add", "iand": "and", "ior": "or", "ishl": "shl", "ishr": "ashr"}
_FORMAT_OF = {
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "float8_e4m3fn": "F8_E4M3"
}  # fmt: skip

DECLARATIONS = "".join(
    f"declare {type} @llvm.{name}.{suffix}({type})\n"
    for name in ("fabs", "sqrt")
    for type, suffix in (("float", "f32"), ("double", "f64"))
)


class Types:
    """The LLVM types of the nodes of a kernel.

    Args:
        wide: whether the work dtype is float64.
    """

    def __init__(self, wide: bool) -> None:
        self.work = "double" if wide else "float"
        self._types = {Type.NUMBER: self.work, Type.WIDE: "double", Type.FLAG: "i1", Type.INTEGER: "i64"}
        self._types[Type.HASH] = "i32"

    def of(self, type: Type) -> str:
        """The LLVM type of a node's type."""
        return self._types[type]


def converted(f: Function, value: str, before: str, after: str) -> str:
    """A number as float or double."""
    if before == after:
        return value
    return f.value(f"{'fpext' if after == 'double' else 'fptrunc'} {before} {value} to {after}")


def parameter(f: Function, place: int, type: str) -> str:
    """A number of a loop, which is stored as double, as a float, a double or a flag."""
    value = f.load("%numbers", place, "double")
    if type == "i1":
        return f.value(f"fcmp une double {value}, {literal(0.0, 'double')}")
    return converted(f, value, "double", type)


def type_of_use(node: Node, arg: Node, types: Types) -> str:
    """The type in which a node uses a constant or scalar."""
    return "i1" if arg.type is Type.FLAG else used_type(node, types)


def operation(f: Function, node: Node, args: Sequence[str], types: Types) -> str:
    """The value of a node whose result depends on its operands only.

    Args:
        f: function to write to.
        node: node.
        args: values of the operands; constants and scalars in the type in which they are used.
        types: types of the kernel.
    """
    op = node.op
    type = used_type(node, types)
    if op in _ARITHMETIC:
        return f.value(f"{_ARITHMETIC[op]} {type} {args[0]}, {args[1]}")
    if op in COMPARISONS:
        return f.value(f"fcmp {_PREDICATES[op]} {type} {args[0]}, {args[1]}")
    if op in ("minimum", "maximum"):
        other = f.value(f"fcmp {'olt' if op == 'minimum' else 'ogt'} {type} {args[1]}, {args[0]}")
        return f.value(f"select i1 {other}, {type} {args[1]}, {type} {args[0]}")
    if op in _INTEGER:
        return f.value(f"{_INTEGER[op]} i64 {args[0]}, {node.value}")
    return _OTHERS[op](f, node, args, types)


def used_type(node: Node, types: Types) -> str:
    """The type in which a node uses its constants and scalars."""
    wide = any(arg.type is Type.WIDE and arg.in_tile for arg in node.args)
    return "double" if wide else types.work


def _where(f: Function, node: Node, args: Sequence[str], types: Types) -> str:
    type = used_type(node, types)
    return f.value(f"select i1 {args[0]}, {type} {args[1]}, {type} {args[2]}")


def _call(f: Function, node: Node, args: Sequence[str], types: Types) -> str:
    type = types.of(node.type)
    name = {"abs": "fabs", "sqrt": "sqrt"}[node.op]
    return f.value(f"call {type} @llvm.{name}.{'f64' if type == 'double' else 'f32'}({type} {args[0]})")


def _number(f: Function, node: Node, args: Sequence[str], types: Types) -> str:
    one, zero = literal(1.0, types.work), literal(0.0, types.work)
    return f.value(f"select i1 {args[0]}, {types.work} {one}, {types.work} {zero}")


def _convert(f: Function, node: Node, args: Sequence[str], types: Types) -> str:
    return converted(f, args[0], types.of(node.args[0].type), types.of(node.type))


def _single(f: Function, node: Node, args: Sequence[str], types: Types) -> str:
    before = types.of(node.args[0].type)
    return converted(f, converted(f, args[0], before, "float"), "float", types.of(node.type))


def _round(f: Function, node: Node, args: Sequence[str], types: Types) -> str:
    name = _FORMAT_OF[node.value]
    value, type = nearest(f, args[0], types.of(node.args[0].type), name)
    return converted(f, value, type, types.work)


def _next_power(f: Function, node: Node, args: Sequence[str], types: Types) -> str:
    """The bits of the significand, which are added to a number, carry to its exponent unless all of its own are 0."""
    type = types.of(node.type)
    stored, mantissa = ("i64", (1 << 52) - 1) if type == "double" else ("i32", (1 << 23) - 1)
    bits = f.value(f"add {stored} {f.value(f'bitcast {type} {args[0]} to {stored}')}, {mantissa}")
    power = f.value(f"bitcast {stored} {f.value(f'and {stored} {bits}, {-mantissa - 1}')} to {type}")
    nan = f.value(f"fcmp uno {type} {args[0]}, {args[0]}")
    return f.value(f"select i1 {nan}, {type} {args[0]}, {type} {power}")


def _fraction(f: Function, node: Node, args: Sequence[str], types: Types) -> str:
    number = f.value(f"sitofp i32 {f.value(f'lshr i32 {args[0]}, 8')} to {types.work}")
    return f.value(f"fmul {types.work} {number}, {literal(2.0**-24, types.work)}")


_OTHERS: Mapping[str, Callable[[Function, Node, Sequence[str], Types], str]] = {
    "neg": lambda f, node, args, types: f.value(f"fneg {types.of(node.type)} {args[0]}"),
    "abs": _call,
    "sqrt": _call,
    "and": lambda f, node, args, types: f.value(f"and i1 {args[0]}, {args[1]}"),
    "or": lambda f, node, args, types: f.value(f"or i1 {args[0]}, {args[1]}"),
    "not": lambda f, node, args, types: f.value(f"xor i1 {args[0]}, true"),
    "where": _where,
    "number": _number,
    "fill": lambda f, node, args, types: args[0],
    "wide": _convert,
    "narrow": _convert,
    "single": _single,
    "round": _round,
    "next_power": _next_power,
    "fraction": _fraction,
    "to_wide": lambda f, node, args, types: f.value(f"sitofp i64 {args[0]} to double"),
    "bits": lambda f, node, args, types: f.value(f"bitcast double {args[0]} to i64"),
    "from_bits": lambda f, node, args, types: f.value(f"bitcast i64 {args[0]} to double"),
}


def hashed(f: Function, index: str, start: str, between: str) -> str:
    """The hash of an element: lowbias32 of C. Wellons, with a number added between its two rounds.

    Args:
        f: function to write to.
        index: index of the element in the loop, i32.
        start: hash input of index 0, i32.
        between: the number, i32.
    """
    x = f.value(f"add i32 {f.value(f'mul i32 {index}, {_signed(STEP)}')}, {start}")
    x = _folded(f, x, 16)
    x = f.value(f"add i32 {f.value(f'mul i32 {x}, {_signed(FIRST)}')}, {between}")
    x = f.value(f"mul i32 {_folded(f, x, 15)}, {_signed(SECOND)}")
    return _folded(f, x, 16)


def _folded(f: Function, x: str, shift: int) -> str:
    return f.value(f"xor i32 {x}, {f.value(f'lshr i32 {x}, {shift}')}")


def _signed(x: int) -> int:
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)
