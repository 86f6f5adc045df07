"""Task graphs in memory, whose expected outputs are computed from complete tensors with numpy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergeloom.engine.graph.footprint import Footprint, Line
from mergeloom.engine.graph.graph import Kind, MergeGraph, Operation
from mergeloom.io.tensors.dtypes import DTYPES
from mergeloom.methods import Array, Inputs, add, host
from mergeloom.methods.kernel.access import ALIGNED, Access, BlockRows
from mergeloom.methods.kernel.array import Factor
from mergeloom.methods.kernel.composition import Composition, Part
from mergeloom.methods.kernel.decoder import Encoder, block_max, low_rank, next_power_of_two
from mergeloom.methods.kernel.fused.compiled import Compiled
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.spec import InputSpec, Unit
from tests.support.graphs import World, stored
from tests.support.methods.kernels import method_of
from tests.support.methods.oracle_accesses import expanded, factor, low_rank_product

Shape = tuple[int, ...]


def operands_of(t: Inputs) -> Iterator[Any]:
    """The inputs, with the product of each two that are the factors of one."""
    inputs = iter(t.models)
    for each in inputs:
        yield low_rank(each, next(inputs)) if isinstance(each, Factor) else each


def summed(t: Inputs) -> Array:
    """Three times the sum of the operands: one pass."""
    return 3 * add(list(operands_of(t)))


def voted(t: Inputs) -> Array:
    """Three passes: the total of all elements, how many exceed a share of the total, and the sum plus that number."""
    values = add(list(operands_of(t)))
    count = t.count(values > t.sum(values) * 2.0**-10)
    return values + host(lambda number: number % 8, count)


def converted(t: Inputs) -> Array:
    """The only operand, which changes nothing but its dtype."""
    return next(operands_of(t))  # type: ignore[no-any-return]


SEVERAL = Encoder("several", lambda value: (value, 2 * value, value - 2 * value), 3)
"""A value, its double, and the value with the opposite sign."""
BLOCKED = Encoder(
    "blocked",
    lambda value, *, rows, columns: (
        value,
        block_max(value, rows, columns),
        next_power_of_two(block_max(value, 2 * rows, columns)) + (block_max(value, 2 * rows, columns) == 0),
    ),
    3,
)
"""A value, the maxima of its blocks, and powers of 2 above those of blocks with twice as many rows; 1 for zeros."""
METHODS = {"sum": method_of(summed), "vote": method_of(voted), "convert": method_of(converted)}
KERNELS = ("sum", "vote", "sum 48", "sum 9999", "vote 9999")
"""The kinds of kernels: a method, and the number of elements that its tiles are a multiple of, by default 16."""


@dataclass(frozen=True)
class Operand:
    """What a kernel adds up: a value with an access to it, or the factors of a low-rank product.

    Args:
        values: reads by number, and nodes as ``~node``.
        accesses: access to each of them.
    """

    values: tuple[int, ...]
    accesses: tuple[Access, ...] = (ALIGNED,)

    @property
    def copies(self) -> bool:
        """Whether a copy can be made: of one tensor in a file, whose elements keep their order."""
        return len(self.values) == 1 and self.values[0] >= 0 and self.accesses[0].aligned


@dataclass(repr=False)
class TaskWorld(World):
    """A graph of tasks. The elements of all tensors are whole numbers so small that every sum is exact.

    Attributes:
        computed: for each node, its output.
        expected_outputs: for each output by its label, the bytes.
    """

    computed: dict[int, Tensor] = field(default_factory=dict)
    expected_outputs: dict[str, bytes] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = [f"{number}: {list(ref.shape)} {ref.dtype.name}" for number, ref in enumerate(self.graph.reads)]
        for node in self.graph:
            accesses = self.graph.operation(node).accesses or "aligned"
            sources, dtype = self.graph.node_sources[node], self.graph.node_dtype[node].name
            outputs = [output.label for output in self.graph.outputs if output.node == node]
            method, shape = self.graph.operation(node).method, list(self.graph.shape(node))
            lines.append(f"{~node}: {method} of {sources} {accesses}: {shape} {dtype} {outputs}")
        return "\n".join(["TaskWorld", *lines])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Let Hypothesis print a failing example as `repr` does, without its tensors."""
        printer.text(repr(self))

    def fresh(self, graph: MergeGraph | None = None) -> TaskWorld:
        """The same tensors and expected outputs, of this graph or of another one, before anything is read."""
        made = replace(self, graph=graph or self.graph, reads=[], written={}, counts={})
        if graph is not None:
            made.measure()
        return made

    def measure(self) -> None:
        """Set the memory that the kernels of the CPU take."""
        for node in self.graph.tasks():
            kernel = self.graph.operation(node).kernel
            if kernel is not None:
                dtypes = [self.graph.value_dtype(value).name for value in self.graph.node_sources[node]]
                loops = Compiled(kernel, dtypes, *(dtype.name for dtype in self.graph.result_dtypes(node)))
                self.graph.footprints[self.graph.node_class[node]] = Footprint(
                    Line(loops.scratch), Line(loops.allocated)
                )

    def task(
        self, kind: str, operands: Sequence[Operand], shape: Shape, dtype: str | None = None, outputs: int = 1
    ) -> int:
        """Add a node of kind ``copy``, ``equal``, ``convert`` or one of the `KERNELS`; return its number.

        Args:
            kind: kind of the node.
            operands: what is copied, compared or added up.
            shape: shape of the output.
            dtype: dtype of the output; that of the first value if None.
            outputs: number of output tensors.
        """
        values = tuple(value for operand in operands for value in operand.values)
        accesses = tuple(access for operand in operands for access in operand.accesses)
        if all(access is ALIGNED for access in accesses):
            accesses = ()
        stored_dtype = self.graph.value_dtype(values[0]) if dtype is None else DTYPES[dtype]
        node = self.graph.append_node(self._operation(kind, values, accesses, shape), values, stored_dtype, 0, shape)
        first = self._value(operands[0], shape)
        result = first if kind in ("copy", "equal") else self._merged(kind, [self._value(o, shape) for o in operands])
        assert stored_dtype.torch_name is not None
        self.computed[node] = torch.from_numpy(result.copy(order="C")).to(getattr(torch, stored_dtype.torch_name))
        for _ in range(outputs):
            self.output(node)
        return node

    def several(self, operands: Sequence[Operand], shape: Shape, dtypes: tuple[str, str, str]) -> int:
        """Add a node of kind ``sum`` that computes three tensors, all of them outputs; return its number.

        Args:
            operands: what is added up.
            shape: shape of the tensors.
            dtypes: dtype of each: the sum, its double, and the sum with the opposite sign.
        """
        node, total = self._several(operands, shape, dtypes, SEVERAL, {}, (shape, shape))
        self._expect(node, dtypes, (total, 2 * total, total - 2 * total))
        return node

    def blocked(
        self, operands: Sequence[Operand], shape: Shape, dtypes: tuple[str, str, str], blocks: tuple[int, int]
    ) -> int:
        """Add a node of kind ``sum`` with two more tensors that have one element per block; return its number.

        Args:
            operands: what is added up.
            shape: shape of the sum.
            dtypes: dtype of each: the sum, the maxima, and powers of 2.
            blocks: rows and columns of a block.
        """
        accesses = BlockRows(*blocks), BlockRows(2 * blocks[0], blocks[1])
        shapes = [access.resized((), shape)[1] if size(shape) else (0,) for access in accesses]
        parameters = {"rows": blocks[0], "columns": blocks[1]}
        node, total = self._several(operands, shape, dtypes, BLOCKED, parameters, (shapes[0], shapes[1]))
        maxima = [largest_of_blocks(total, access) for access in accesses]
        _, exponents = np.frexp(maxima[1])
        above = np.ldexp(1.0, exponents)
        powers = np.where(maxima[1] == 0, 1.0, np.where(maxima[1] == above / 2, maxima[1], above))
        values = (total, *(x.reshape(s) for x, s in zip((maxima[0], powers), shapes, strict=True)))
        self._expect(node, dtypes, values)
        return node

    def _several(
        self,
        operands: Sequence[Operand],
        shape: Shape,
        dtypes: Sequence[str],
        encoder: Encoder,
        parameters: Mapping[str, int],
        shapes: tuple[Shape, Shape],
    ) -> tuple[int, Any]:
        """Add a node that encodes a sum as three tensors; return its number and the sum."""
        values = tuple(value for operand in operands for value in operand.values)
        accesses = tuple(access for operand in operands for access in operand.accesses)
        if all(access is ALIGNED for access in accesses):
            accesses = ()
        summed = self._operation("sum", values, accesses, shape).kernel
        assert summed is not None
        last = Part(encoder.kernel(InputSpec(1, None, shape), parameters), (~0,))
        kernel = Composition(summed.inputs, [Part(summed, tuple(range(len(values)))), last])
        if kernel.unit is Unit.ELEMENT:
            kernel.alignment = 16
        main, *others = (DTYPES[name] for name in dtypes)
        node = self.graph.append_node(Operation(Kind.MERGE, encoder.name, kernel=kernel), values, main, 0, shape)
        self.graph.add_results(node, zip(others, shapes, strict=True))
        return node, self._merged("sum", [self._value(operand, shape) for operand in operands])

    def _expect(self, node: int, dtypes: Sequence[str], values: Sequence[Any]) -> None:
        """Make outputs of all tensors of a node, with these values."""
        for result, computed, name in zip(self.graph.results(node), values, dtypes, strict=True):
            torch_name = DTYPES[name].torch_name
            assert torch_name is not None
            self.computed[result] = torch.from_numpy(computed).to(getattr(torch, torch_name))
            self.output(result)

    def output(self, node: int) -> None:
        """Add an output of a node."""
        self.graph.add_output(f"out{len(self.graph.outputs)}", node, 0)
        self.expected_outputs[self.graph.outputs[-1].label] = stored(self.computed[node], self.graph.node_dtype[node])

    def _operation(self, kind: str, values: Sequence[int], accesses: tuple[Access, ...], shape: Shape) -> Operation:
        if kind == "copy":
            return Operation(Kind.COPY, "copy", copied=accesses)
        if kind == "equal":
            return Operation(Kind.REQUIRE_EQUAL, "equal")
        parts = tuple(map(self.graph.value_shape, values)) if accesses else ()
        return Operation(Kind.MERGE, kind, kernel=kernel_of(kind, InputSpec(len(values), None, shape, accesses, parts)))

    def _value(self, operand: Operand, shape: Shape) -> Any:
        """An operand as an array of a shape."""
        arrays = [self.values_of(value).to(torch.float64).numpy() for value in operand.values]
        if len(arrays) == 2:
            left, right = (factor(*each, shape) for each in zip(arrays, operand.accesses, strict=True))
            return low_rank_product(left, right).reshape(shape)
        return expanded(arrays[0], operand.accesses[0], shape)

    def values_of(self, value: int) -> Tensor:
        """A complete tensor: of a file, or computed by a node."""
        return self.tensors[value] if value >= 0 else self.computed[~value]

    def _merged(self, kind: str, operands: Sequence[Any]) -> Any:
        total = np.array(sum(operands), dtype=np.float64)
        if kind.startswith("sum"):
            total = 3 * total
        elif kind.startswith("vote"):
            above = total > np.float32(total.sum() * 2.0**-10)
            total = total + int(above.sum()) % 8
        return total

    def expected(self, node: int) -> bytes:
        """Return the expected output bytes of a node with an output."""
        return self.expected_outputs[next(output.label for output in self.graph.outputs if output.node == node)]

    def check(self, *, resumed: bool = False) -> None:
        """Check that every output is correct, and was written exactly once, in a resumed run at most once."""
        for node in {output.node: None for output in self.graph.outputs}:
            if self.graph.elements(node):
                assert bytes(self.written[node]) == self.expected(node), node
                assert resumed or bool((self.counts[node] == 1).all()), node
                assert bool((self.counts.get(node, torch.zeros(1)) <= 1).all()), node
        assert self.written.keys() <= {output.node for output in self.graph.outputs}

    def bytes_by_read(self) -> list[int]:
        """The bytes that were read of each source tensor."""
        found = [0] * len(self.graph.reads)
        ends = {
            (ref.file, ref.offset): (n, ref.offset + ref.nbytes) for n, ref in enumerate(self.graph.reads) if ref.nbytes
        }
        starts = {file: sorted(offset for name, offset in ends if name == file) for file in self.files}
        for file, offset, nbytes in self.reads:
            start = starts[file][int(np.searchsorted(starts[file], offset, "right")) - 1]
            number, end = ends[file, start]
            assert start <= offset < offset + nbytes <= end
            found[number] += nbytes
        return found


def kernel_of(kind: str, inputs: InputSpec) -> Kernel:
    """A kernel of one of the `KERNELS`."""
    name, _, alignment = kind.partition(" ")
    kernel = METHODS[name].kernel(inputs, {})
    kernel.alignment = int(alignment or 16)
    return kernel


def largest_of_blocks(values: Any, blocks: BlockRows) -> Any:
    """The largest magnitude of each block, of shape (stack, rows of blocks, blocks)."""
    rows, columns = (1, *values.shape)[-2:]
    if 0 in values.shape:
        return np.zeros((0, 0, 0))
    return np.array(
        [
            [
                [
                    np.abs(matrix[row : row + blocks.rows, column : column + blocks.columns]).max()
                    for column in range(0, columns, blocks.columns)
                ]
                for row in range(0, rows, blocks.rows)
            ]
            for matrix in values.reshape(-1, rows, columns)
        ]
    )


def size(shape: Shape) -> int:
    """The number of elements of a shape."""
    return math.prod(shape)
