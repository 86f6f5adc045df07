"""A kernel: a merge method that is traced for the inputs and the parameters of one output tensor.

The engine runs one pass over the tiles for each step of its reductions, and a last one that computes the output. After
each pass, the merged partial results give the next `State`. Results depend on the elements, the parameters and the
random keys, never on the boundaries of the tiles.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Protocol

from .expression import Extent, HostCall, Node, Trace, blocks_of, inputs_of, reachable
from .program import Program
from .reduction.reductions import Reduction, block_in_rows, row_block
from .spec import BLOCK, InputSpec, Unit, rows_of_blocks

_ROW_OPERATIONS = frozenset(("row_sum", "row_max", "row_rank"))
_NOT_BY_ELEMENT = _ROW_OPERATIONS | {"index", "hash", "selected", "block_max"}

_KEEPING = frozenset(
    ("neg", "abs", "sqrt", "wide", "narrow", "single", "round", "fill", "block_max", "next_power", "div")
)
"""Operations whose result is not finite if their first operand is not."""


class Traceable(Protocol):
    """What a kernel needs of its method."""

    @property
    def name(self) -> str:
        """Name in recipes."""

    @property
    def function(self) -> Callable[..., Any]:
        """The method's code."""

    def kernel(self, inputs: InputSpec, parameters: Mapping[str, Any]) -> Kernel:
        """Trace the method for other inputs."""


@dataclass(frozen=True, slots=True)
class State:
    """The results of the passes so far.

    Args:
        reductions: state of each reduction of the kernel.
        scalars: value of each scalar and column that is known, by the id of its node.
    """

    reductions: tuple[Any, ...]
    scalars: Mapping[int, Any]


class Kernel:
    """An expression graph and what is derived from it.

    Args:
        inputs: inputs of the output tensor.
        outputs: node of each tensor that is computed, with one number of the work dtype per element, or per block.
        bound: method and parameters that the kernel was traced from.
        uses_shape: whether the expressions are others for other shapes of the output.
        byproducts: sums that no output depends on, over elements that are computed with the outputs; see `survival`.

    Attributes:
        output: node of the first tensor, which has one number per element.
        blocks: for each tensor, the blocks that it has one element for; None if it has one for each element.
        traced: inputs of the method, of which `inputs` may be a part.
        kept: index among the traced inputs of each input.
        reduced: nodes of the reductions that the outputs depend on.
        unit: unit that tiles do not split.
        height: number of rows that tile boundaries are a multiple of, if the unit is not the element.
        alignment: number of elements that tile boundaries are a multiple of.
        reductions: maximum number of passes before the last one.
        random: whether the random key of the output tensor matters.
        copies: index of the input whose elements are those of the only output, in their order; None for others.
        used: indices of the inputs that the output depends on; the first one if it depends on none.
        propagates_nonfinite: whether a NaN or an infinity in any input always reaches an output. If so, only the
            outputs are checked.
        any_shape: whether the expressions and the passes are the same for any shape of the output.
    """

    def __init__(
        self,
        inputs: InputSpec,
        outputs: Sequence[Node],
        bound: tuple[Traceable, Mapping[str, Any]],
        *,
        uses_shape: bool = True,
        byproducts: Sequence[Node] = (),
    ) -> None:
        self.inputs = self.traced = inputs
        self.kept = tuple(range(inputs.count))
        self.outputs = tuple(outputs)
        self.output = self.outputs[0]
        self.byproducts = tuple(byproducts)
        self.blocks = tuple(blocks_of(node) if node.extent is Extent.BLOCK else None for node in self.outputs)
        self.bound = bound
        nodes = reachable(*self.outputs)
        heights = {node.value.rows for node in nodes if node.op == "block_max"}
        by_row = any(node.op in _ROW_OPERATIONS for node in nodes)
        self.unit = Unit.BLOCK_ROW if heights else Unit.ROW if by_row else Unit.ELEMENT
        self.height = rows_of_blocks(inputs.shape, heights) if heights else 1
        self.reduced = [node for node in nodes if node.op == "reduce"]
        self.alignment = self._bind_reductions(nodes)
        self.random = any(node.op == "hash" for node in nodes)
        output = self.output
        copied = len(self.outputs) == 1 and output.op == "load" and inputs.access(output.value).aligned
        self.copies: int | None = output.value if copied else None
        self.used = tuple(sorted({index for node in nodes for index in inputs_of(node)})) or (0,)
        propagated = _always_propagated(nodes)
        self.propagates_nonfinite = set(self.used) <= set().union(*(propagated[id(each)] for each in self.outputs))
        self._scalars = [node for node in nodes if not node.in_tile and not node.constant and node.level]
        self._depth = max(each.level for each in self.outputs)
        steps = [
            max((node.value.steps for node in self.reduced if node.level == level + 1), default=0)
            for level in range(self._depth)
        ]
        self._passes = [(level, step) for level, count in enumerate(steps) for step in range(count)]
        self.reductions = len(self._passes)
        self._programs: dict[tuple[int, ...] | None, Program] = {}
        called = [node.value.function for node in nodes if node.op == "host"]
        self.any_shape = not uses_shape and self.unit is Unit.ELEMENT and all(map(_is_plain, called))

    def _bind_reductions(self, nodes: Sequence[Node]) -> int:
        """Set the blocks of the reductions, and return the alignment of the tiles."""
        columns = max(1, self.inputs.columns)
        block = BLOCK
        if self.unit is Unit.ROW:
            block = row_block(columns)
        elif self.unit is Unit.BLOCK_ROW:
            block = block_in_rows(self.height, columns)
        for node in (*self.reduced, *self.byproducts):
            reduction: Reduction = node.value
            if hasattr(reduction, "sampled"):
                reduction.sampled = _by_element(node.args[0])
            reduction.bind(block)
        blocks = {node.value.block for node in (*self.reduced, *self.byproducts)}
        return math.lcm(*blocks or (BLOCK,)) if self.unit is Unit.ELEMENT else math.lcm(*blocks, self.height * columns)

    def written(self, number: int, first: int, count: int) -> tuple[int, int]:
        """The first element and the number of elements of an output that are computed with a range of the first's.

        Args:
            number: number of the output.
            first: index of the range's first element, a multiple of the alignment.
            count: number of elements of the range.
        """
        blocks = self.blocks[number]
        if blocks is None or not count:
            return (first, count) if blocks is None else (0, 0)
        (span,) = blocks.spans(self.inputs.shape, (), first, count)
        return span.start, span.length

    def __repr__(self) -> str:
        """One line with the method, the shape and the number of passes."""
        inputs = f"{self.inputs.count} x {list(self.inputs.shape)}"
        return f"<Kernel {self.bound[0].name} of {inputs}, {self.reductions + 1} passes>"

    def resized(self, shape: tuple[int, ...]) -> Kernel:
        """The kernel of the same method and parameters for another shape."""
        if self.any_shape:
            kernel = copy.copy(self)
            kernel.inputs, kernel.traced = self.inputs.resized(shape), self.traced.resized(shape)
            return kernel
        method, parameters = self.bound
        kernel = method.kernel(self.traced.resized(shape), parameters)
        return kernel if self.inputs.count == self.traced.count else kernel.with_used_inputs()

    def with_used_inputs(self) -> Kernel:
        """The same kernel without the inputs that the output does not depend on, such as models of weight 0."""
        used = self.used
        if len(used) == self.inputs.count:
            return self
        trace = Trace()

        def leaf(node: Node) -> Node | None:
            if node.op == "load":
                return trace.load(used.index(node.value))
            if node.op == "low_rank":
                left, right = node.value
                return trace.low_rank(used.index(left), used.index(right))
            return trace.hash(used.index(node.value[0])) if node.op == "hash" else None

        known = self.byproducts if depend_on(self.byproducts, used) else ()
        rebuilt = trace.rebuilt([*self.outputs, *known], leaf)
        outputs, byproducts = rebuilt[: len(self.outputs)], rebuilt[len(self.outputs) :]
        uses_shape = not self.any_shape
        kernel = Kernel(self.inputs.selected(used), outputs, self.bound, uses_shape=uses_shape, byproducts=byproducts)
        kernel.traced, kernel.kept = self.traced, used
        return kernel

    # --- passes ------------------------------------------------------------------------------------------------------

    @property
    def reduce_nodes(self) -> tuple[Node, ...]:
        """The nodes of all reductions by their numbers: first those of `reduced`, then the by-products."""
        return (*self.reduced, *self.byproducts)

    def active(self, index: int, state: State | None) -> tuple[int, ...]:
        """The numbers of the reductions that pass `index` continues."""
        level, step = self._passes[index]
        states = self._states(state)
        return tuple(
            number
            for number, node in enumerate(self.reduced)
            if node.level == level + 1 and step < node.value.steps and node.value.needed(step, states[number])
        )

    def needed(self, index: int, state: State | None) -> bool:
        """Whether pass `index` can still change the state; the engine skips it otherwise."""
        return bool(self.active(index, state))

    def step(self, index: int) -> int:
        """The step of the reductions in pass `index`."""
        return self._passes[index][1]

    def program(self, active: tuple[int, ...] | None) -> Program:
        """The program that computes the operands of some reductions, or the outputs and the by-products if None."""
        program = self._programs.get(active)
        if program is None:
            outputs = [*self.outputs, *self.byproducts]
            targets = outputs if active is None else [self.reduced[number] for number in active]
            program = self._programs[active] = Program(targets)
        return program

    def merge(self, index: int, merged: list[Any] | None, partial: list[Any]) -> list[Any]:
        """Add the partial results of a chunk, one per reduction, to those of the chunks before it (None at first)."""
        if merged is None:
            return partial
        pairs = zip(self.reduced, merged, partial, strict=True)
        return [b if a is None else a if b is None else node.value.merge(a, b) for node, a, b in pairs]

    def finish(self, index: int, merged: list[Any] | None, state: State | None) -> State:
        """The state after pass `index`; `merged` is None for a tensor without elements."""
        step = self.step(index)
        states = list(self._states(state))
        for number in self.active(index, state):
            partial = None if merged is None else merged[number]
            states[number] = self.reduced[number].value.finish(step, partial, states[number])
        last = index + 1 == self.reductions or self._passes[index + 1][1] == 0
        following = State(tuple(states), state.scalars if state else {})
        if last or not self.needed(index + 1, following):
            following = replace(following, scalars=self._evaluated(self._passes[index][0] + 1, following))
        return following

    def _states(self, state: State | None) -> tuple[Any, ...]:
        return (None,) * len(self.reduced) if state is None else state.reductions

    def _evaluated(self, level: int, state: State) -> dict[int, Any]:
        """The values of all scalars and columns up to a level."""
        values = dict(state.scalars)
        numbers = {id(node): number for number, node in enumerate(self.reduced)}
        for node in self._scalars:
            if node.level > level or id(node) in values:
                continue
            if node.op == "reduce":
                number = numbers[id(node)]
                values[id(node)] = node.value.value(state.reductions[number])
            elif node.op in ("item", "threshold"):
                values[id(node)] = _item(values[id(node.args[0])], node)
            elif node.op == "magnitude":
                values[id(node)] = values[id(node.args[0])].value
            elif node.op == "host":
                values[id(node)] = call_host(node, [values[id(leaf)] for leaf in node.value.leaves])
        return values

    # --- memory ------------------------------------------------------------------------------------------------------

    def workspace(self, elements: int, itemsize: int) -> int:
        """The size in bytes of the workspace for a tile of `elements` elements in a work dtype of `itemsize` bytes."""
        return max(program.nbytes(elements, itemsize) for program in self._all_programs)

    @functools.cached_property
    def _all_programs(self) -> list[Program]:
        levels = range(self._depth)
        active = [tuple(n for n, node in enumerate(self.reduced) if node.level == level + 1) for level in levels]
        return [self.program(numbers) for numbers in (*active, None)]


def _is_plain(value: Any, within: frozenset[int] = frozenset()) -> bool:
    """Whether a function holds nothing but numbers and other such functions, so it cannot ask for a shape when called.

    Args:
        value: the function, or what a function holds.
        within: ids of the functions that hold it.
    """
    if isinstance(value, FunctionType):
        if id(value) in within:
            return True
        try:
            held = [cell.cell_contents for cell in value.__closure__ or ()]
        except ValueError:  # a variable that has no value yet
            return False
        held += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).values()]
        return all(_is_plain(each, within | {id(value)}) for each in held)
    if isinstance(value, (tuple, list)):
        return all(_is_plain(each, within) for each in value)
    if isinstance(value, BuiltinFunctionType):
        return isinstance(value.__self__, ModuleType)
    return value is None or isinstance(value, (bool, int, float, str, type))


def depend_on(nodes: Sequence[Node], inputs: Collection[int]) -> bool:
    """Whether nodes depend on no other inputs than these."""
    return all(index in inputs for node in reachable(*nodes) for index in inputs_of(node))


def _by_element(node: Node) -> bool:
    """Whether an element depends on elements at the same place only, and not on the place, which allows to sample some.

    An operand with one value per column depends on the place.
    """
    return not any(each.op in _NOT_BY_ELEMENT or each.extent is Extent.COLUMN for each in reachable(node, in_tile=True))


def call_host(node: Node, values: Sequence[Any]) -> Any:
    """The result of a host node for the values of its leaves; a list of results for columns."""
    call: HostCall = node.value
    if node.extent is not Extent.COLUMN:
        return call(values)
    columns = [value if leaf.extent is Extent.COLUMN else None for leaf, value in zip(call.leaves, values, strict=True)]
    width = next(len(column) for column in columns if column is not None)
    repeated = [[value] * width if column is None else column for column, value in zip(columns, values, strict=True)]
    return [call(column) for column in zip(*repeated, strict=True)]


def _item(value: Any, node: Node) -> Any:
    """One of several results, for each column if there are columns. NaN stands for all results."""
    if node.extent is Extent.COLUMN:
        return [each if isinstance(each, float) else each[node.value] for each in value]
    return value if isinstance(value, float) else value[node.value]


def _always_propagated(nodes: Sequence[Node]) -> dict[int, frozenset[int]]:
    """For each node, the inputs of which a NaN or an infinity in an element always makes that element not finite, or
    its block."""
    result: dict[int, frozenset[int]] = {}
    for node in nodes:
        args = [result[id(arg)] for arg in node.args]
        if node.op in ("load", "low_rank"):
            found = frozenset(inputs_of(node))
        elif node.op in ("add", "sub", "mul"):
            found = args[0] | args[1]
        elif node.op in _KEEPING or (node.op == "maximum" and node.args[0].op in ("abs", "block_max")):
            found = args[0]
        elif node.op == "where":
            found = args[1] & args[2]
        else:
            found = frozenset()
        result[id(node)] = found
    return result
