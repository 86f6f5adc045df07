"""An independent evaluator of a kernel's expression graph: numpy, complete tensors, one operation at a time.

It defines the bytes of every method. It shares no arithmetic with mergeloom: each operation is written from its
definition, without tiles, passes, brackets or workspaces. Values are represented like this:

- one per element: an array of the tensor's shape;
- one per row: the same with a last dimension of 1;
- one per column (each index of the dimensions after the first): the same with a first dimension of 1;
- one per tensor: a Python number, a `Ranking` or a `Threshold`.

Values per tensor and per column are float64, and are rounded to float32 where they meet an array.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mergeloom.methods.kernel.access import BlockRows
from mergeloom.methods.kernel.expression import Extent, HostCall, Node, Type
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.reduction.reductions import ColumnSum, Count, Selection, StripSum, Sum
from mergeloom.methods.kernel.reduction.target import Target
from mergeloom.methods.kernel.spec import InputSpec
from tests.support.methods.oracle_accesses import expanded, factor, low_rank_product
from tests.support.methods.oracle_numbers import Numbers, hashes, loaded, rounded, stored
from tests.support.methods.oracle_sums import block_sum, folded, strip_sum, total

__all__ = ["evaluate", "hashes", "rounded", "stored"]


def evaluate(
    kernel: Kernel, inputs: Sequence[torch.Tensor], *, key: int = 0, positions: Sequence[int] | None = None
) -> Numbers:
    """The first output of a kernel in the work dtype; see `evaluate_all`."""
    return evaluate_all(kernel, inputs, key=key, positions=positions)[0]


def evaluate_byproducts(
    kernel: Kernel, inputs: Sequence[torch.Tensor], *, key: int = 0, positions: Sequence[int] | None = None
) -> list[float]:
    """The by-products of a kernel; see `evaluate_all`."""
    with np.errstate(all="ignore"):
        evaluation = Evaluation(kernel.inputs, inputs, key, positions or range(len(inputs)))
        return [evaluation.scalar(node) for node in kernel.byproducts]


def evaluate_all(
    kernel: Kernel, inputs: Sequence[torch.Tensor], *, key: int = 0, positions: Sequence[int] | None = None
) -> list[Numbers]:
    """The outputs of a kernel in the work dtype.

    Args:
        kernel: the kernel, of which only the expression graph is used.
        inputs: its inputs, complete and in the shapes that they are stored in.
        key: random key of the output tensor.
        positions: position in the recipe of each input's model.
    """
    with np.errstate(all="ignore"):
        evaluation = Evaluation(kernel.inputs, inputs, key, positions or range(len(inputs)))
        return [evaluation.output(node, blocks) for node, blocks in zip(kernel.outputs, kernel.blocks, strict=True)]


# --- evaluation ------------------------------------------------------------------------------------------------------


class Evaluation:
    """The values of the nodes of one expression graph.

    Args:
        spec: shape and accesses of the inputs.
        inputs: as for `evaluate`.
        key: as for `evaluate`.
        positions: as for `evaluate`.
    """

    def __init__(self, spec: InputSpec, inputs: Sequence[torch.Tensor], key: int, positions: Sequence[int]) -> None:
        self.work: Any = np.float64 if any(x.dtype is torch.float64 for x in inputs) else np.float32
        self.spec, self.inputs, self.key, self.positions = spec, inputs, key, positions
        self.shape = spec.shape or (1,)
        self.row_shape, self.column_shape = (*self.shape[:-1], 1), (1, *self.shape[1:])
        self.known: dict[int, Any] = {}

    def scalar(self, node: Node) -> float:
        """The value of a node with one value per tensor."""
        return float(self._evaluated(node))

    def _evaluated(self, node: Node) -> Any:
        for each in _in_order(node):
            self.known[id(each)] = self._value(each)
        return self.known[id(node)]

    def output(self, node: Node, blocks: BlockRows | None = None) -> Numbers:
        """The value of a node with one value per element, or flat with one for each block."""
        result: Numbers = self._evaluated(node)
        assert result.shape == self.shape
        assert result.dtype == self.work
        if blocks is None:
            return result.reshape(self.spec.shape)
        matrices = result.reshape(-1, *((1, *self.shape)[-2:]))
        return matrices[:, :: blocks.rows, :: blocks.columns].reshape(-1)

    def _value(self, node: Node) -> Any:
        op = node.op
        if op == "constant":
            return node.value
        if op in SPECIAL:
            return SPECIAL[op](self, node)
        if op in INTEGERS:
            return INTEGERS[op](*self._operands(node), np.int64(node.value))
        result = OPERATIONS[op](*self._operands(node)).astype(self._dtype(node.type), copy=False)
        return np.broadcast_to(result, self.shape) if node.extent is Extent.ELEMENT else result

    def _dtype(self, type: Type) -> Any:
        wide, flag, integer = Type.WIDE, Type.FLAG, Type.INTEGER
        return {Type.NUMBER: self.work, wide: np.float64, flag: np.bool_, integer: np.int64}[type]

    def _operands(self, node: Node) -> list[Numbers]:
        """The operands as arrays. Constants and scalars take the dtype of the arrays that they meet."""
        wide = any(arg.type is Type.WIDE and arg.in_tile for arg in node.args)
        return [self._operand(arg, np.float64 if wide else self.work) for arg in node.args]

    def _operand(self, node: Node, dtype: Any) -> Numbers:
        value = self.known[id(node)]
        if node.in_tile:
            array: Numbers = value
            return array
        if node.type is Type.FLAG:
            return np.array(value, dtype=np.bool_)
        if node.constant:
            return np.array(value, dtype=dtype)
        return np.array(value, dtype=np.float64).astype(np.float32).astype(dtype)

    def _whole(self, node: Node) -> Numbers:
        """The only operand with one value per element."""
        return np.broadcast_to(self._operands(node)[0], self.shape)

    # --- inputs and random numbers -----------------------------------------------------------------------------------

    def load(self, node: Node) -> Numbers:
        values = loaded(self.inputs[node.value], self.work)
        return expanded(values, self.spec.access(node.value), self.shape).reshape(self.shape)

    def low_rank(self, node: Node) -> Numbers:
        if 0 in self.shape:
            return np.zeros(self.shape, self.work)
        left, right = (
            factor(loaded(self.inputs[index], self.work), self.spec.access(index), self.shape) for index in node.value
        )
        return low_rank_product(left, right).reshape(self.shape)

    def index(self, node: Node) -> Numbers:
        return np.arange(math.prod(self.shape), dtype=np.int64).reshape(self.shape)

    def hash(self, node: Node) -> Numbers:
        index, stream = node.value
        key, position = stream or (self.key, self.positions[index])
        return hashes(key, position, self.index(node))

    def fraction(self, node: Node) -> Numbers:
        return (self.known[id(node.args[0])] >> np.uint32(8)).astype(self.work) * self.work(2.0**-24)

    # --- Python functions --------------------------------------------------------------------------------------------

    def host(self, node: Node) -> Any:
        """The result, a list of results, or one of these per row or column."""
        call: HostCall = node.value
        values = [leaf.value if leaf.constant else self.known[id(leaf)] for leaf in call.leaves]
        if node.extent is Extent.TENSOR:
            return _called(call, values)
        shape = self.row_shape if node.extent is Extent.ROW else self.column_shape
        lines = zip(*(np.broadcast_to(value, shape).reshape(-1).tolist() for value in values), strict=True)
        return self._per_line(node, [_called(call, line) for line in lines])

    def item(self, node: Node) -> Any:
        """One of several results; NaN stands for all of them."""
        results = self.known[id(node.args[0])]
        if node.extent is Extent.TENSOR:
            return _one_of(results, node.value)
        return self._per_line(node, [_one_of(result, node.value) for result in results])

    def _per_line(self, node: Node, results: list[Any]) -> Any:
        """Results per row or column as an array, if each is a number."""
        if any(isinstance(result, (list, tuple)) for result in results):
            return results
        if node.extent is Extent.COLUMN:
            return np.array(results).reshape(self.column_shape)
        return np.array(results, dtype=np.float64).reshape(self.row_shape).astype(np.float32).astype(self.work)

    # --- reductions --------------------------------------------------------------------------------------------------

    def reduce(self, node: Node) -> Any:
        reduction, values = node.value, self.known[id(node.args[0])]
        assert values.shape == self.shape
        if isinstance(reduction, Count):
            return float(np.count_nonzero(values))
        if isinstance(reduction, StripSum):
            rows = values.reshape(-1, self.shape[-1])
            height = reduction.block // self.shape[-1]
            return total([strip_sum(rows[start : start + height]) for start in range(0, len(rows), height)])
        if isinstance(reduction, Sum):
            flat, block = values.reshape(-1), reduction.block
            return total([block_sum(flat[start : start + block]) for start in range(0, len(flat), block)])
        if isinstance(reduction, ColumnSum):
            slices, height = values.reshape(self.shape[0], -1).astype(np.float64), reduction.height
            starts = range(0, self.shape[0], height)
            sums = [functools.reduce(np.add, slices[start : start + height]) for start in starts]
            return np.array([total(column) for column in zip(*sums, strict=True)]).reshape(self.column_shape)
        assert isinstance(reduction, Selection)
        return Ranking(values.reshape(-1).astype(np.float32), reduction.targets)

    def threshold(self, node: Node) -> Threshold:
        ranking: Ranking = self.known[id(node.args[0])]
        return ranking.threshold(ranking.targets[node.value])

    def magnitude(self, node: Node) -> float:
        return float(self.known[id(node.args[0])].value)

    def selected(self, node: Node) -> Numbers:
        chosen: Numbers = self.known[id(node.args[1])].chosen
        return chosen.reshape(self.shape)

    def row_sum(self, node: Node) -> Numbers:
        return folded(self._whole(node).astype(np.float64))

    def row_max(self, node: Node) -> Numbers:
        largest: Numbers = self._whole(node).max(axis=-1, keepdims=True)
        return np.where(largest == 0, largest.dtype.type(0), largest)

    def row_rank(self, node: Node) -> Numbers:
        order = np.argsort(_keys(self._whole(node).astype(np.float32)), axis=-1, kind="stable")
        ranks = np.empty(self.shape, dtype=self.work)
        places = np.broadcast_to(np.arange(self.shape[-1], dtype=self.work), self.shape)
        np.put_along_axis(ranks, order, places, axis=-1)
        return ranks

    def block_max(self, node: Node) -> Numbers:
        height, width = node.value.rows, node.value.columns
        rows, columns = (1, *self.shape)[-2:]
        matrices = self._whole(node).reshape(-1, rows, columns)
        padded = np.pad(matrices, ((0, 0), (0, -rows % height), (0, -columns % width)))
        blocks = padded.reshape(len(padded), -(-rows // height), height, -1, width)
        return expanded(blocks.max(axis=(2, 4)), node.value, self.shape)

    def next_power(self, node: Node) -> Numbers:
        (values,) = self._operands(node)
        fractions, exponents = np.frexp(np.abs(values))
        powers = np.maximum(np.ldexp(values.dtype.type(1), exponents - (fractions == 0.5)), np.finfo(values.dtype).tiny)
        powers = np.copysign(powers, values)
        return np.where(np.isfinite(values) & (values != 0), powers, values).astype(self._dtype(node.type))

    def fill(self, node: Node) -> Numbers:
        return self._whole(node).astype(self._dtype(node.type))

    def round(self, node: Node) -> Numbers:
        dtype = getattr(torch, node.value)
        if dtype.itemsize == 1:
            nearest = torch.frombuffer(bytearray(stored(self._whole(node), dtype)), dtype=torch.uint8).view(dtype)
            return nearest.to(torch.float64).numpy().reshape(self.shape).astype(self.work)
        return rounded(self._whole(node), dtype).astype(self.work)


def _in_order(output: Node) -> Iterator[Node]:
    """The nodes of a graph, each once, operands first."""
    done: set[int] = set()
    stack = [output]
    while stack:
        node = stack[-1]
        if waiting := [arg for arg in node.args if id(arg) not in done]:
            stack += waiting
            continue
        stack.pop()
        if id(node) not in done:
            done.add(id(node))
            yield node


def _called(call: HostCall, values: Sequence[Any]) -> Any:
    """The result of a Python function of scalars; NaN if one of them is not finite."""
    following = iter(values)

    def filled(arg: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return tuple(filled(each) for each in arg)
        return next(following) if isinstance(arg, Node) else arg

    if call.finite and not all(math.isfinite(value) for value in values):
        return math.nan
    return call.function(*filled(call.args))


def _one_of(results: Any, number: int) -> Any:
    return results[number] if isinstance(results, (list, tuple)) else results


# --- magnitudes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """The elements with the k largest magnitudes.

    Args:
        value: the k-th largest magnitude; infinity if k is 0.
        chosen: whether an element is one of the k, flat; False for NaN.
    """

    value: float
    chosen: Numbers


@dataclass(frozen=True)
class Ranking:
    """Magnitudes to select from.

    Args:
        magnitudes: magnitudes as float32, flat.
        targets: what to select.
    """

    magnitudes: Numbers
    targets: Sequence[Target]

    def threshold(self, target: Target) -> Threshold:
        """The largest elements; of equal ones, the first are chosen; NaN counts as largest."""
        nonzero = np.count_nonzero(self.magnitudes)  # NaN is not 0
        rank = int(target.share * nonzero) if target.rank is None else target.rank
        order = np.argsort(-_keys(self.magnitudes), kind="stable")
        chosen = np.zeros(len(order), dtype=np.bool_)
        chosen[order[:rank]] = True
        value = float(self.magnitudes[order[rank - 1]]) if rank and len(order) else math.inf
        return Threshold(value, chosen & ~np.isnan(self.magnitudes))


def _keys(magnitudes: Numbers) -> Numbers:
    """Integers in the order of float32 magnitudes; all NaNs are equal and the largest."""
    return np.where(np.isnan(magnitudes), (1 << 31) - 1, np.ascontiguousarray(magnitudes).view(np.int32)).astype(
        np.int64
    )


# --- operations ------------------------------------------------------------------------------------------------------

SPECIAL: Mapping[str, Callable[[Evaluation, Node], Any]] = {
    name: getattr(Evaluation, name)
    for name in (
        *("load", "low_rank", "index", "hash", "fraction", "host", "item", "reduce", "threshold", "magnitude"),
        *("selected", "row_sum", "row_max", "row_rank", "block_max", "next_power", "fill", "round"),
    )
}

OPERATIONS: Mapping[str, Callable[..., Numbers]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "minimum": lambda a, b: np.where(b < a, b, a),
    "maximum": lambda a, b: np.where(b > a, b, a),
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "not": lambda a: ~a,
    "where": np.where,
    "number": lambda a: a,
    "wide": lambda a: a,
    "narrow": lambda a: a,
    "to_wide": lambda a: a,
    "single": lambda a: a.astype(np.float32),
    "bits": lambda a: np.ascontiguousarray(a).view(np.int64),
    "from_bits": lambda a: np.ascontiguousarray(a).view(np.float64),
}

INTEGERS: Mapping[str, Callable[..., Numbers]] = {
    "iadd": lambda a, b: a + b,
    "iand": lambda a, b: a & b,
    "ior": lambda a, b: a | b,
    "ishl": lambda a, b: a << b,
    "ishr": lambda a, b: a >> b,
}
