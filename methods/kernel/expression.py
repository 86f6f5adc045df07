"""The expression graph of a merge method: nodes, their types and extents, and the rules that simplify them.

Tracing a method yields the node of its output. Everything else is derived from the nodes: which inputs are read, the
passes over the tiles, the workspace, randomness, and whether a NaN reaches the output. Equal nodes of one trace are the
same object, so a common subexpression is computed once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any

from ...errors import UsageError
from .access import BlockRows
from .arithmetic import ARITHMETIC, COMPARISONS, nearest_float32, next_power
from .spec import HostError

__all__ = ["Extent", "MethodDefinitionError", "Node", "Trace", "Type", "blocks_of", "inputs_of", "reachable"]


class Type(Enum):
    """The type of a node's elements."""

    NUMBER = "number"  # the work dtype: float32, or float64 if an input is float64
    WIDE = "wide"  # float64
    FLAG = "flag"  # bool
    INTEGER = "integer"  # int64
    HASH = "hash"  # int32


class Extent(IntEnum):
    """What a node has one value for."""

    TENSOR = 0
    ROW = 1
    COLUMN = 2
    BLOCK = 3
    ELEMENT = 4


class MethodDefinitionError(UsageError):
    """A merge method that cannot be traced. The message names the file and the line of the method."""


def definition_error(message: str) -> MethodDefinitionError:
    """The error for the innermost line outside this package's kernel, which is the line of the method."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith(__package__ or "-"):
        frame = frame.f_back
    return MethodDefinitionError(f"{frame.f_code.co_filename}:{frame.f_lineno}: {message}")


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """A value in an expression graph.

    Args:
        op: name of the operation; see `torch_backend.operations` for what each computes.
        args: operands.
        type: type of the elements.
        extent: what there is one value for.
        value: what the operation needs besides its operands: a constant, the number of an input, a reduction.
        level: number of passes over all tiles that must precede: a reduction's result is one level above its operand.
    """

    op: str
    args: tuple[Node, ...]
    type: Type
    extent: Extent
    value: Any = None
    level: int = 0

    @property
    def constant(self) -> bool:
        """Whether the value is known when the method is traced."""
        return self.op == "constant"

    @property
    def in_tile(self) -> bool:
        """Whether a tile's program computes the node: it is neither constant nor known from earlier passes."""
        return self.extent in (Extent.ROW, Extent.BLOCK, Extent.ELEMENT) and not self.constant


class Trace:
    """Creates the nodes of one expression graph."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[Any, ...], Node] = {}

    def node(
        self, op: str, args: Sequence[Node], type: Type, extent: Extent | None = None, value: Any = None, rise: int = 0
    ) -> Node:
        """Create a node, or find an equal one.

        Args:
            op: as in `Node`.
            args: as in `Node`.
            type: as in `Node`.
            extent: as in `Node`; None for that of the operand with one value for the most elements.
            value: as in `Node`; hashable.
            rise: 1 for a reduction over tiles, else 0.
        """
        identity = repr(value) if isinstance(value, float) else getattr(value, "key", value)  # -0.0 equals 0.0
        key = (op, tuple(map(id, args)), type, extent, identity)
        found = self._nodes.get(key)
        if found is None:
            extents = {arg.extent for arg in args}
            if extent is None:
                extent = Extent.ELEMENT if _mixed(args) else max(extents, default=Extent.ELEMENT)
            level = max((arg.level for arg in args), default=0) + rise
            found = self._nodes[key] = Node(op, tuple(args), type, extent, value, level)
        return found

    def constant(self, value: float | bool) -> Node:
        """A constant: a bool is a flag, anything else a number."""
        if isinstance(value, bool):
            return self.node("constant", (), Type.FLAG, Extent.TENSOR, value)
        return self.node("constant", (), Type.NUMBER, Extent.TENSOR, float(value))

    # --- elementwise operations ------------------------------------------------------------------------------------

    def arithmetic(self, op: str, a: Node, b: Node) -> Node:
        """A binary operation on numbers. Operations that change nothing are left out: x + 0, 1 x; and 0 x is 0."""
        if a.constant and b.constant:
            return self.constant(ARITHMETIC[op](float(a.value), float(b.value)))
        a, b = self.number(a), self.number(b)
        if (simple := self._simplified(op, a, b)) is not None:
            return simple
        if not a.in_tile and not b.in_tile:
            return self.scalar(ARITHMETIC[op], (a, b))
        a, b, type = self.common(a, b)
        return self.node(op, (a, b), type)

    def _simplified(self, op: str, a: Node, b: Node) -> Node | None:
        first, second = (node.value if node.constant else None for node in (a, b))
        if op == "add" and 0 in (first, second):
            return b if first == 0 else a
        if op == "sub" and second == 0:
            return a
        if op == "sub" and first == 0:
            return self.unary("neg", b)
        if op == "mul" and 0 in (first, second):
            return self.constant(0.0)
        if op == "mul" and 1 in (first, second):
            return b if first == 1 else a
        if op == "div" and second == 1:
            return a
        return a if op in ("minimum", "maximum") and a is b else None

    def compare(self, op: str, a: Node, b: Node) -> Node:
        """A comparison, which is false if an operand is NaN (except for ``ne``)."""
        if a.constant and b.constant:
            return self.constant(COMPARISONS[op](float(a.value), float(b.value)))
        if a.op == "fraction" and b.constant and op in ("lt", "ge") and (b.value <= 0 or b.value >= 1):
            return self.constant((b.value >= 1) == (op == "lt"))  # a fraction is at least 0 and below 1
        a, b, _ = self.common(self.number(a), self.number(b))
        if not a.in_tile and not b.in_tile:
            return self.scalar(COMPARISONS[op], (a, b), Type.FLAG)
        return self.node(op, (a, b), Type.FLAG)

    def logical(self, op: str, a: Node, b: Node) -> Node:
        """``and`` or ``or`` of two flags."""
        for one, other in ((a, b), (b, a)):
            if one.constant:
                return other if bool(one.value) == (op == "and") else one
        if not a.in_tile and not b.in_tile:
            return self.scalar((lambda x, y: x and y) if op == "and" else (lambda x, y: x or y), (a, b), Type.FLAG)
        return self.node(op, (a, b), Type.FLAG)

    def unary(self, op: str, a: Node) -> Node:
        """``neg``, ``abs``, ``sqrt`` or ``next_power`` of a number, or ``not`` of a flag."""
        functions: dict[str, Callable[[Any], Any]] = {
            "neg": lambda x: -x,
            "abs": abs,
            "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan,
            "not": lambda x: not x,
            "next_power": next_power,
        }
        if op != "not":
            a = self.number(a)
        if a.constant:
            return self.constant(functions[op](a.value))
        if not a.in_tile:
            return self.scalar(functions[op], (a,), a.type)
        return a if op == "abs" and a.op == "abs" else self.node(op, (a,), a.type)

    def where(self, condition: Node, a: Node, b: Node) -> Node:
        """`a` where the condition holds, else `b`."""
        if condition.constant:
            return a if condition.value else b
        a, b = self.number(a), self.number(b)
        if not any(each.in_tile for each in (condition, a, b)):
            return self.scalar(lambda c, x, y: x if c else y, (condition, a, b))
        if condition.extent is Extent.TENSOR:
            condition = self.node("fill", (condition,), Type.FLAG, Extent.ELEMENT)
        a, b, type = self.common(a, b)
        return self.node("where", (condition, a, b), type)

    # --- conversions -----------------------------------------------------------------------------------------------

    def number(self, a: Node) -> Node:
        """A flag as 0 or 1, an integer as float64; a number is unchanged."""
        if a.type is Type.FLAG:
            if a.constant:
                return self.constant(float(a.value))
            return self.node("number", (a,), Type.NUMBER) if a.in_tile else self.scalar(float, (a,))
        if a.type is Type.INTEGER:
            if a.constant:
                return self.constant(float(a.value))
            return self.node("to_wide", (a,), Type.WIDE) if a.in_tile else self.scalar(float, (a,))
        return a

    def wide(self, a: Node) -> Node:
        """A number as float64."""
        return a if a.type is Type.WIDE or not a.in_tile else self.node("wide", (a,), Type.WIDE)

    def single(self, a: Node) -> Node:
        """A number rounded to float32."""
        if a.constant:
            return self.constant(nearest_float32(a.value))
        return self.node("single", (a,), Type.NUMBER) if a.in_tile else self.scalar(nearest_float32, (a,))

    def narrow(self, a: Node) -> Node:
        """A number rounded to the work dtype."""
        return self.node("narrow", (a,), Type.NUMBER) if a.type is Type.WIDE else a

    def common(self, a: Node, b: Node) -> tuple[Node, Node, Type]:
        """Two numbers as numbers of one type. Constants and scalars take the type of the other operand."""
        if Type.WIDE in {node.type for node in (a, b) if node.in_tile}:
            return self.wide(a), self.wide(b), Type.WIDE
        return a, b, Type.NUMBER

    # --- scalars ---------------------------------------------------------------------------------------------------

    def scalar(self, function: Callable[..., Any], args: Sequence[Node], type: Type = Type.NUMBER) -> Node:
        """The result of an operation on scalars and columns, which defines it for NaN and infinities as well."""
        return self.host(function, args, type=type, finite=False)

    def host(
        self, function: Callable[..., Any], args: Sequence[Any], *, type: Type = Type.NUMBER, finite: bool = True
    ) -> Node:
        """The result of a Python function of scalars and constants; see `language.host` and `HostCall`."""
        args = with_constants(args)
        leaves = [leaf for leaf in flatten(args) if isinstance(leaf, Node)]
        extent = max((leaf.extent for leaf in leaves), default=Extent.TENSOR)
        call = HostCall(function, tuple(args), tuple(leaves), finite)
        return self.node("host", leaves, type, extent, call)

    # --- inputs ------------------------------------------------------------------------------------------------------

    def load(self, index: int) -> Node:
        """An input as numbers of the work dtype."""
        return self.node("load", (), Type.NUMBER, Extent.ELEMENT, index)

    def low_rank(self, left: int, right: int) -> Node:
        """The product of two inputs, of shapes (rows, rank) and (rank, columns), summed over the ranks in order."""
        return self.node("low_rank", (), Type.NUMBER, Extent.ELEMENT, (left, right))

    def hash(self, index: int, stream: tuple[int, int] | None = None) -> Node:
        """Random bits for each element.

        Args:
            index: number of an input, whose position in the recipe the bits depend on.
            stream: random key and position; None for those of the output tensor and of the input.
        """
        return self.node("hash", (), Type.HASH, Extent.ELEMENT, (index, stream))

    # --- composition -----------------------------------------------------------------------------------------------

    def rebuilt(self, nodes: Sequence[Node], leaf: Callable[[Node], Node | None]) -> list[Node]:
        """Copy a graph of another trace into this one.

        Args:
            nodes: outputs of the graph.
            leaf: the replacement of a node, or None to copy it.
        """
        done: dict[int, Node] = {}
        for each in reachable(*nodes):
            replacement = leaf(each)
            if replacement is None:
                args = tuple(done[id(arg)] for arg in each.args)
                value = each.value.moved(done) if hasattr(each.value, "moved") else each.value
                rise = each.level - max((arg.level for arg in each.args), default=0)
                replacement = self.node(each.op, args, each.type, each.extent, value, rise)
            done[id(each)] = replacement
        return [done[id(node)] for node in nodes]


@dataclass(frozen=True, eq=False, slots=True)
class HostCall:
    """A Python function and its arguments, in which nodes stand for scalars.

    Args:
        function: the function; it returns a number or a sequence of numbers.
        args: arguments: constants, nodes, and lists or tuples of these.
        leaves: nodes among the arguments, in order.
        finite: whether the function takes finite numbers only: then the result for any other is NaN.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    leaves: tuple[Node, ...]
    finite: bool = True

    def __call__(self, values: Sequence[Any]) -> Any:
        """The result for the values of the leaves. Raises HostError if the function fails."""
        if self.finite and not all(isinstance(value, bool) or math.isfinite(value) for value in values):
            return math.nan
        arguments = _filled(self.args, iter(values))
        try:
            return self.function(*arguments)
        except Exception as error:
            raise HostError(f"{type(error).__name__}: {error}") from error

    def moved(self, nodes: Mapping[int, Node]) -> HostCall:
        """The same call with other nodes, by the ids of the present ones."""
        following = iter([nodes[id(leaf)] for leaf in self.leaves])
        args = _filled(self.args, following)
        leaves = tuple(leaf for leaf in flatten(args) if isinstance(leaf, Node))
        return HostCall(self.function, args, leaves, self.finite)


def blocks_of(node: Node) -> BlockRows:
    """The blocks that a node with one value per block has a value for."""
    while node.op != "block_max":
        node = next(arg for arg in node.args if arg.extent is Extent.BLOCK)
    blocks: BlockRows = node.value
    return blocks


def _mixed(args: Sequence[Node]) -> bool:
    """Whether operands have one value per row, per column and per block, or per block of different sizes."""
    extents = {arg.extent for arg in args} & {Extent.ROW, Extent.COLUMN, Extent.BLOCK}
    return len(extents) > 1 or len({blocks_of(arg) for arg in args if arg.extent is Extent.BLOCK}) > 1


def inputs_of(node: Node) -> tuple[int, ...]:
    """The numbers of the inputs that a node depends on, apart from those of its operands."""
    if node.op == "load":
        return (node.value,)
    if node.op == "low_rank":
        left, right = node.value
        return left, right
    return (node.value[0],) if node.op == "hash" and node.value[1] is None else ()


def flatten(args: Iterable[Any]) -> Iterator[Any]:
    """The items of nested lists and tuples, in order."""
    for arg in args:
        if isinstance(arg, (list, tuple)):
            yield from flatten(arg)
        else:
            yield arg


def with_constants(args: Any) -> Any:
    """Replace constant nodes in nested lists by their values."""
    if isinstance(args, (list, tuple)):
        return tuple(with_constants(arg) for arg in args)
    return args.value if isinstance(args, Node) and args.constant else args


def _filled(args: Iterable[Any], following: Iterator[Any]) -> tuple[Any, ...]:
    filled = (
        _filled(arg, following) if isinstance(arg, (list, tuple)) else next(following) if isinstance(arg, Node) else arg
        for arg in args
    )
    return tuple(filled)


def reachable(*outputs: Node, in_tile: bool = False, given: Callable[[Node], bool] | None = None) -> list[Node]:
    """All nodes that the outputs depend on, operands first, each once.

    Args:
        outputs: nodes to start from.
        in_tile: whether to stop at constants and at nodes that earlier passes have computed; these are included.
        given: says at which nodes to stop as well, because their values are there; None for no others.
    """
    order: list[Node] = []
    seen: set[int] = set()
    stack = [(node, False) for node in reversed(outputs)]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            if (node.in_tile or not in_tile) and not (given and given(node)):
                stack += [(arg, False) for arg in reversed(node.args)]
    return order
