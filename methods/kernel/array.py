"""Arrays: the values that a merge method computes with. They are symbolic; an operation on them adds a node to a graph.

Allowed: ``+ - * /``, unary ``-``, ``abs``, comparisons, ``& | ~`` of comparisons, and the functions of `language`. All
else is an error that names the operation, the line and the allowed operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from .access import FactorAccess
from .expression import MethodDefinitionError, Node, Trace, Type, definition_error
from .spec import InputSpec

ALLOWED = (
    "+ - * /, abs, sqrt, exp, log, comparisons, & | ~, where, minimum, maximum, clamp, sign, add, mean, uniform, "
    "index, sum, count, kth_largest, largest, row_sum, row_max, row_rank, column_sum, host"
)
KEPT = "an array of another tensor: methods cannot keep arrays between calls"


def refuse(what: str) -> MethodDefinitionError:
    """The error for an operation that arrays do not have."""
    return definition_error(f"{what} is not an operation on arrays; allowed: {ALLOWED}")


class Array:
    """A symbolic array, row vector, column vector or scalar.

    Args:
        node: node that computes it.
        trace: trace that the node belongs to.
    """

    __slots__ = ("node", "trace")

    def __init__(self, node: Node, trace: Trace) -> None:
        self.node = node
        self.trace = trace

    def __repr__(self) -> str:
        """One line with the operation."""
        return f"<Array: {self.node.op}, one {self.node.type.value} per {self.node.extent.name.lower()}>"

    # --- arithmetic ------------------------------------------------------------------------------------------------

    def __add__(self, other: Operand) -> Array:
        return self._arithmetic("add", self, other)

    def __radd__(self, other: Operand) -> Array:
        return self._arithmetic("add", other, self)

    def __sub__(self, other: Operand) -> Array:
        return self._arithmetic("sub", self, other)

    def __rsub__(self, other: Operand) -> Array:
        return self._arithmetic("sub", other, self)

    def __mul__(self, other: Operand) -> Array:
        return self._arithmetic("mul", self, other)

    def __rmul__(self, other: Operand) -> Array:
        return self._arithmetic("mul", other, self)

    def __truediv__(self, other: Operand) -> Array:
        return self._arithmetic("div", self, other)

    def __rtruediv__(self, other: Operand) -> Array:
        return self._arithmetic("div", other, self)

    def __neg__(self) -> Array:
        return Array(self.trace.unary("neg", self.node), self.trace)

    def __abs__(self) -> Array:
        return Array(self.trace.unary("abs", self.node), self.trace)

    # --- comparisons and flags -------------------------------------------------------------------------------------

    def __gt__(self, other: Operand) -> Array:
        return self._compare("gt", other)

    def __ge__(self, other: Operand) -> Array:
        return self._compare("ge", other)

    def __lt__(self, other: Operand) -> Array:
        return self._compare("lt", other)

    def __le__(self, other: Operand) -> Array:
        return self._compare("le", other)

    def __eq__(self, other: Operand) -> Array:  # type: ignore[override]
        return self._compare("eq", other)

    def __ne__(self, other: Operand) -> Array:  # type: ignore[override]
        return self._compare("ne", other)

    __hash__ = object.__hash__

    def __and__(self, other: Operand) -> Array:
        return self._logical("and", other)

    def __or__(self, other: Operand) -> Array:
        return self._logical("or", other)

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> Array:
        if self.node.type is not Type.FLAG:
            raise refuse("~ of numbers")
        return Array(self.trace.unary("not", self.node), self.trace)

    # --- everything else is an error ---------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise refuse(f".{name}")

    def __bool__(self) -> NoReturn:
        raise refuse("if, and, or, not, in or a chained comparison")

    def __iter__(self) -> NoReturn:
        raise refuse("iteration")

    def __len__(self) -> NoReturn:
        raise refuse("len")

    def __float__(self) -> NoReturn:
        raise refuse("float (the value is not known yet; use host for Python functions of scalars)")

    def __int__(self) -> NoReturn:
        raise refuse("int (the value is not known yet; use host for Python functions of scalars)")

    def __getitem__(self, item: object) -> NoReturn:
        raise refuse("[...]")

    def __pow__(self, other: object) -> NoReturn:
        raise refuse("** (write x * x, or use sqrt)")

    def __mod__(self, other: object) -> NoReturn:
        raise refuse("%")

    def __floordiv__(self, other: object) -> NoReturn:
        raise refuse("//")

    def __matmul__(self, other: object) -> NoReturn:
        raise refuse("@")

    __rpow__, __rmod__, __rfloordiv__, __rmatmul__ = __pow__, __mod__, __floordiv__, __matmul__

    @classmethod
    def __torch_function__(cls, function: Any, types: object, args: object = (), kwargs: object = None) -> NoReturn:
        raise refuse(f"torch.{getattr(function, '__name__', function)}")

    def __array_ufunc__(self, function: Any, method: str, *args: object, **kwargs: object) -> NoReturn:
        raise refuse(f"numpy.{function.__name__}")

    def __array_function__(self, function: Any, types: object, args: object, kwargs: object) -> NoReturn:
        raise refuse(f"numpy.{function.__name__}")

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _arithmetic(self, op: str, a: Operand, b: Operand) -> Array:
        return Array(self.trace.arithmetic(op, node_of(a, self.trace), node_of(b, self.trace)), self.trace)

    def _compare(self, op: str, other: Operand) -> Array:
        return Array(self.trace.compare(op, self.node, node_of(other, self.trace)), self.trace)

    def _logical(self, op: str, other: Operand) -> Array:
        a, b = self.node, node_of(other, self.trace)
        if not a.type is b.type is Type.FLAG:
            raise refuse("& or | of numbers")
        return Array(self.trace.logical(op, a, b), self.trace)


class Factor:
    """An input of another shape than the output's: a factor of a low-rank product. `low_rank` alone takes it.

    Args:
        index: number of the input.
        spec: inputs of the output.
        access: access to it.
        trace: trace that it belongs to.

    Attributes:
        shape: its shape as it is stored.
        by_row: whether it is a left factor.
        lines: rows or columns of a matrix that it has elements for.
        rank: number of elements for each of them.
        columns: number of elements in a row of the output.
    """

    __slots__ = ("by_row", "columns", "index", "lines", "rank", "shape", "trace")

    def __init__(self, index: int, spec: InputSpec, access: FactorAccess, trace: Trace) -> None:
        self.index, self.shape, self.trace = index, spec.part(index), trace
        self.by_row, self.columns = access.by_row, spec.columns
        self.lines, self.rank = access.size(spec.shape, self.shape)

    def refuse(self, *others: object) -> NoReturn:
        """Raise MethodDefinitionError, as every operation on a factor does."""
        raise definition_error(
            f"an input of shape {list(self.shape)}, which is used by row or as a unit, cannot be used as an array: use "
            "low_rank(left, right)"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = refuse
    __neg__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = __matmul__ = __rmatmul__ = __bool__ = refuse


Operand = Array | float | bool
"""An operand of an array operation: an array or a Python number."""


def node_of(value: Any, trace: Trace) -> Node:
    """The node of an operand. Raises MethodDefinitionError for anything but an array of this trace or a number."""
    if isinstance(value, Array):
        if value.trace is not trace:
            raise definition_error(KEPT)
        return value.node
    if isinstance(value, (bool, int, float)):
        return trace.constant(value)
    if isinstance(value, Factor):
        value.refuse()
    raise refuse(f"an operand of type {type(value).__name__}")


def trace_of(values: Sequence[Any]) -> Trace | None:
    """The trace of the first array among the values, or None."""
    return next((value.trace for value in values if isinstance(value, Array)), None)


def where(condition: Operand, a: Operand, b: Operand) -> Array:
    """`a` where the condition holds, else `b`. A NaN in the value that is not chosen is lost."""
    trace = common_trace(condition, a, b)
    test = node_of(condition, trace)
    if test.type is not Type.FLAG:
        raise refuse("where with a condition that is not a comparison")
    return Array(trace.where(test, node_of(a, trace), node_of(b, trace)), trace)


def minimum(a: Operand, b: Operand) -> Array:
    """`b` where it is less than `a`, else `a`."""
    return _binary("minimum", a, b)


def maximum(a: Operand, b: Operand) -> Array:
    """`b` where it is greater than `a`, else `a`."""
    return _binary("maximum", a, b)


def clamp(x: Operand, low: Operand, high: Operand) -> Array:
    """`x`, limited to the range from `low` to `high`; a NaN stays a NaN."""
    return minimum(maximum(x, low), high)


def low_rank(left: Factor, right: Factor) -> Array:
    """The product of two matrices: the sum over k of ``left[row, k] * right[k, column]``, starting at 0.

    The ranks are added in order in the work dtype; each product and each sum is rounded. Of a stack, each matrix is a
    product of its own.

    Args:
        left: input with `rank` elements for each row of the output: accessed by `SameRows` or `RowFactor`.
        right: input with `rank` elements for each column: accessed by `Whole` or `ColumnFactor`.

    Raises:
        MethodDefinitionError: the inputs are others, or their shapes do not fit.
    """
    if not isinstance(left, Factor) or not isinstance(right, Factor):
        raise definition_error("low_rank takes two inputs: one with the output's rows, and one that is used as a unit")
    fits = left.rank == right.rank and right.lines in (left.columns, max(1, left.columns))
    if not left.by_row or right.by_row or not fits:
        raise definition_error(
            f"low_rank takes an input of shape (rows, rank) and one of shape (rank, {left.columns}), and not of shapes "
            f"{list(left.shape)} and {list(right.shape)}"
        )
    return Array(left.trace.low_rank(left.index, right.index), left.trace)


def common_trace(*values: Any) -> Trace:
    trace = trace_of(values)
    if trace is None:
        raise definition_error("at least one operand must be an array")
    return trace


def _binary(op: str, a: Operand, b: Operand) -> Array:
    trace = common_trace(a, b)
    return Array(trace.arithmetic(op, node_of(a, trace), node_of(b, trace)), trace)
