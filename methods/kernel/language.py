"""The vocabulary of merge methods: functions of arrays, and the inputs of a method with their reductions.

    @merge_method("task_arithmetic", base=Base.REQUIRED)
    def task_arithmetic(t: Inputs, *, weight: Weight, lambda_: Finite = 1.0) -> Array:
        return t.base + lambda_ * add([w * (x - t.base) for x, w in zip(t.models, weight)])

A method computes one output tensor. Arithmetic is in float32, or in float64 if an input is float64; each operation is
rounded separately. Scalars that are computed from reductions are Python floats, and are rounded to float32 where they
meet an array, because mathematical functions differ in the last bit between C libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from .access import BlockRows, FactorAccess
from .array import (
    Array,
    Factor,
    Operand,
    clamp,
    common_trace,
    low_rank,
    maximum,
    minimum,
    node_of,
    refuse,
    trace_of,
    where,
)
from .expression import Extent, Node, Trace, Type, definition_error, flatten, with_constants
from .polynomials import exponential, logarithm
from .reduction.reductions import ColumnSum, Count, Selection, Sum
from .reduction.target import Target
from .spec import InputSpec, MethodError

__all__ = [
    "Array",
    "Inputs",
    "add",
    "clamp",
    "exp",
    "host",
    "log",
    "low_rank",
    "maximum",
    "mean",
    "minimum",
    "sign",
    "single",
    "sqrt",
    "where",
    "wide",
]

A = TypeVar("A")


def sign(x: Array) -> Array:
    """-1, 0 or 1; 0 for a NaN."""
    return _array(x > 0) * 1.0 - _array(x < 0) * 1.0


def sqrt(x: Array) -> Array:
    """The square root, correctly rounded."""
    return Array(x.trace.unary("sqrt", x.node), x.trace)


def exp(x: Array) -> Array:
    """e to the power of x, in float64, with an error of less than 2 units in the last place.

    x is limited to the range from -708 to 709, in which the result is a normal number.
    """
    return exponential(wide(x))


def log(x: Array) -> Array:
    """The natural logarithm of positive normal numbers, in float64, with an error of less than 2 units in the last
    place; NaN for all others."""
    return logarithm(wide(x))


def wide(x: Array) -> Array:
    """The array as float64. Operations with it are in float64, and the output is rounded to the work dtype."""
    return Array(x.trace.wide(x.trace.number(x.node)), x.trace)


def single(x: Array) -> Array:
    """The array rounded to float32, as `Inputs.kth_largest` and `Inputs.largest` compare it."""
    return Array(x.trace.single(x.trace.number(x.node)), x.trace)


def next_power_of_two(x: Array) -> Array:
    """x, or the next power of 2 of a larger magnitude, with x's sign; 0, NaN and infinities are unchanged.

    For a number below the normal ones of the dtype, this is the smallest normal number.
    """
    return Array(x.trace.unary("next_power", x.trace.number(x.node)), x.trace)


def rounded(x: Array, dtype: str) -> Array:
    """Numbers rounded once to a dtype by its name in torch: bfloat16, float16, float32, float64 or float8_e4m3fn."""
    node = x.trace.number(x.node)
    if node.extent is not Extent.BLOCK:
        node = _filled(node, x.trace)
    return Array(x.trace.node("round", (node,), Type.NUMBER, value=dtype), x.trace)


def block_max(x: Array, rows: int, columns: int) -> Array:
    """The largest magnitude in each block of the matrix; NaN if the block has a NaN.

    What is computed from it, scalars and constants has one value per block. It is repeated for all elements of a block
    where it meets an array. The blocks at the right and at the lower edge of each matrix of a stack are partial.

    Args:
        x: array.
        rows: rows of a block, at least 1.
        columns: columns of a block, at least 1.

    Raises:
        MethodDefinitionError: the array has one value per row or column, or a block has no elements.
    """
    if not (isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0):
        raise definition_error(f"block_max takes the rows and the columns of a block, and not {rows!r} and {columns!r}")
    magnitudes = x.trace.unary("abs", _filled(x.trace.number(x.node), x.trace))
    node = x.trace.node("block_max", (magnitudes,), magnitudes.type, Extent.BLOCK, BlockRows(rows, columns))
    return Array(node, x.trace)


def add(terms: Sequence[Operand]) -> Array:
    """The sum of the terms, added in order."""
    trace = common_trace(*terms)
    total = node_of(terms[0], trace)
    for term in terms[1:]:
        total = trace.arithmetic("add", total, node_of(term, trace))
    return Array(total, trace)


def mean(terms: Sequence[Operand]) -> Array:
    """The sum of the terms, added in order, divided by their number."""
    return add(terms) / len(terms)


def host(function: Callable[..., Any], *args: Any, outputs: int | None = None) -> Any:
    """Call a Python function of scalars between two passes, or once per row or column for sums over these.

    Args:
        function: function of Python floats that returns one float, or `outputs` floats. It is called with the values
            of the scalars among the arguments, and not called if one of these is not finite: then its results are NaN.
        args: scalars, constants, and nested lists of these.
        outputs: number of results; None for a single one.

    Returns:
        A scalar, or a list of `outputs` scalars.

    Raises:
        MethodDefinitionError: an argument is an array with one value per element, or there are rows and columns.
    """
    arrays = [arg for arg in flatten(args) if isinstance(arg, Array)]
    trace = trace_of(arrays)
    if trace is None:
        raise definition_error("host needs a scalar, such as t.sum(x), among its arguments")
    extents = {array.node.extent for array in arrays}
    if extents & {Extent.BLOCK, Extent.ELEMENT}:
        raise definition_error("host takes scalars, such as t.sum(x), and not arrays")
    if {Extent.ROW, Extent.COLUMN} <= extents:
        raise definition_error("host takes values per row or values per column, and not both")
    if all(array.node.constant for array in arrays):
        results = function(*with_constants(_nodes(args, trace)))
        return [Array(trace.constant(r), trace) for r in results] if outputs else Array(trace.constant(results), trace)
    call = trace.host(function, _nodes(args, trace))
    if outputs is None:
        return Array(call, trace)
    return [Array(trace.node("item", (call,), call.type, call.extent, number), trace) for number in range(outputs)]


class Inputs:
    """The inputs of one output tensor as symbolic arrays, and the reductions over its elements.

    Args:
        spec: number, base, shape and accesses of the inputs.

    Attributes:
        models: inputs other than the base, in recipe order.
        inputs: all inputs: arrays, and factors of low-rank products.
        uses_shape: whether the method has asked for the shape: if not, its expression is the same for any shape.
        shared: whether a kernel for any shape was made, so asking for the shape is an error.
    """

    def __init__(self, spec: InputSpec) -> None:
        self.trace = Trace()
        self._spec = spec
        self.uses_shape = bool(spec.accesses)
        self.shared = False
        self._base = spec.base
        self.inputs: list[Any] = [self._input(spec, index) for index in range(spec.count)]
        self.models = [each for index, each in enumerate(self.inputs) if index != spec.base]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the output, and of every input that is an array."""
        return self._asked.shape

    @property
    def size(self) -> int:
        """The number of elements."""
        return self._asked.rows * self._asked.columns

    @property
    def columns(self) -> int:
        """The number of elements in a row: the last dimension; 1 for a 0-d tensor."""
        return self._asked.columns

    @property
    def _asked(self) -> InputSpec:
        """The inputs, for a method that asks for their shape."""
        if self.shared:
            raise definition_error("a function that is called between passes must get the shape from the method")
        self.uses_shape = True
        return self._spec

    @property
    def base(self) -> Array:
        """The base model's input. Raises MethodError if there is none."""
        if self._base is None:
            raise MethodError("the method needs a base model among the inputs")
        base: Array = self.inputs[self._base]
        return base

    @property
    def origin(self) -> Array:
        """The base model's input, or 0 without a base model."""
        return self._array(self.trace.constant(0.0)) if self._base is None else self.base

    @property
    def other(self) -> Array:
        """The only input besides the base. Raises MethodError if there are several."""
        if len(self.models) != 1:
            raise MethodError(f"the method takes exactly one input, got {len(self.models)}")
        other: Array = self.models[0]
        return other

    @property
    def index(self) -> Array:
        """The index of each element in row-major order."""
        return self._array(self.trace.node("index", (), Type.INTEGER, Extent.ELEMENT))

    def uniform(self, model: Array) -> Array:
        """A random number for each element: a multiple of 2^-24, at least 0 and below 1.

        A pure function of the seed, the output tensor's name, the model's position in the recipe and the element.
        """
        node = node_of(model, self.trace)
        if node.op != "load":
            raise definition_error("uniform takes an input, such as one of t.models")
        return self._array(self.trace.node("fraction", (self.trace.hash(node.value),), Type.NUMBER))

    # --- reductions to one value -------------------------------------------------------------------------------------

    def sum(self, x: Array) -> Array:
        """The sum over all elements: in fixed blocks, in float64 from 2^11 elements per block on."""
        node = self.trace.number(node_of(x, self.trace))
        if node.constant:
            return self._constant(node.value * self.size)
        return self._reduce(self._element(x), Sum(), Type.WIDE)

    def count(self, flags: Array) -> Array:
        """The number of elements for which a comparison holds."""
        node = node_of(flags, self.trace)
        if node.type is not Type.FLAG:
            raise refuse("count of an array that is not a comparison")
        if node.constant:
            return self._constant(float(self.size if node.value else 0))
        return self._reduce(_filled(node, self.trace), Count(), Type.WIDE)

    def column_sum(self, x: Array) -> Array:
        """The sum over the first dimension, for each index of the others: in fixed blocks, in float64."""
        if not self.shape:
            return self.sum(x)
        node = self.trace.wide(self._element(x))
        return self._array(self.trace.node("reduce", (node,), Type.WIDE, Extent.COLUMN, ColumnSum(self.shape), 1))

    def kth_largest(self, x: Array, k: int) -> Array:
        """The k-th largest magnitude of the tensor, starting at 1, in float32.

        Raises:
            MethodDefinitionError: the tensor has fewer than k elements, or k is less than 1 or no int.
        """
        _require_int(k)
        if self.size and not 1 <= k <= self.size:
            raise definition_error(f"kth_largest takes k from 1 to the number of elements, {self.size}, and not {k}")
        threshold = self._target(x, Target(k, exact=False))
        return self._array(self.trace.node("magnitude", (threshold,), Type.WIDE))

    def largest(self, x: Array, k: int | None = None, *, share: float | None = None) -> Array:
        """Whether an element is one of the k with the largest magnitudes; of equal ones, the first are chosen.

        A NaN counts as one of the largest, but is not chosen.

        Args:
            x: an array. Magnitudes are compared in float32.
            k: number of elements; below 1 none are chosen, and from the tensor's number of elements on all are.
            share: instead of `k`, the fraction of the elements other than 0.

        Raises:
            MethodDefinitionError: `k` is not an int, or without `k`, the share is not between 0 and 1.
        """
        if k is not None:
            _require_int(k)
            if not 0 < k < self.size:
                return self._array(self.trace.constant(k > 0))
        elif share is None or not 0 <= share <= 1:
            raise definition_error(f"largest takes a number of elements, or a share between 0 and 1, and not {share}")
        threshold = self._target(x, Target(k, share=1.0 if share is None else share))
        magnitudes = self.trace.unary("abs", self._element(x))
        return self._array(self.trace.node("selected", (magnitudes, threshold), Type.FLAG))

    # --- reductions to one value per row -----------------------------------------------------------------------------

    def row_sum(self, x: Array) -> Array:
        """The sum of each row in float64: halves are added until one column remains."""
        return self._array(self.trace.node("row_sum", (self._element(x),), Type.WIDE, Extent.ROW))

    def row_max(self, x: Array) -> Array:
        """The largest element of each row; NaN if the row has a NaN."""
        node = self._element(x)
        return self._array(self.trace.node("row_max", (node,), node.type, Extent.ROW))

    def row_rank(self, x: Array) -> Array:
        """The rank of each element's magnitude in its row, from 0 for the smallest; of equal ones, later rank higher.

        Magnitudes are compared in float32. Ranks are exact up to 2^24.
        """
        magnitudes = self.trace.unary("abs", self._element(x))
        return self._array(self.trace.node("row_rank", (magnitudes,), Type.NUMBER))

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _input(self, spec: InputSpec, index: int) -> Any:
        access = spec.access(index)
        if isinstance(access, FactorAccess):
            return Factor(index, spec, access, self.trace)
        return self._array(self.trace.load(index))

    def _array(self, node: Node) -> Array:
        return Array(node, self.trace)

    def _constant(self, value: float) -> Array:
        return self._array(self.trace.constant(value))

    def _element(self, x: Array) -> Node:
        """The node of an array of numbers with one value per element."""
        return _filled(self.trace.number(node_of(x, self.trace)), self.trace)

    def _reduce(self, node: Node, reduction: Any, type: Type) -> Array:
        return self._array(self.trace.node("reduce", (node,), type, Extent.TENSOR, reduction, rise=1))

    def _target(self, x: Array, target: Target) -> Node:
        """The node of a search for a magnitude. Searches in one array share their passes."""
        magnitudes = self.trace.unary("abs", self._element(x))
        selection = self.trace.node("reduce", (magnitudes,), Type.WIDE, Extent.TENSOR, Selection(self.size), rise=1)
        number = selection.value.add(target)
        return self.trace.node("threshold", (selection,), Type.WIDE, Extent.TENSOR, number)


def _filled(node: Node, trace: Trace) -> Node:
    """An array with one value per element; those per block, scalars and constants are repeated."""
    if node.extent in (Extent.ROW, Extent.COLUMN):
        raise definition_error("a reduction needs an array with one value per element")
    if node.extent is Extent.ELEMENT:
        return node
    type = node.type if node.in_tile or node.type is Type.FLAG else Type.NUMBER
    return trace.node("fill", (node,), type, Extent.ELEMENT)


def _require_int(k: object) -> None:
    if not isinstance(k, int):
        raise definition_error(f"the number of elements must be an int, such as int(0.2 * t.size), and not {k!r}")


def _array(flags: Array) -> Array:
    return Array(flags.trace.number(flags.node), flags.trace)


def _nodes(args: Any, trace: Trace) -> Any:
    """Replace arrays in nested lists by their nodes."""
    if isinstance(args, (list, tuple)):
        return tuple(_nodes(arg, trace) for arg in args)
    return node_of(args, trace) if isinstance(args, Array) else args
