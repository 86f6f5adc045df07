"""Composes the kernels of several stages into one that computes intermediate tensors tile by tile.

Of an intermediate tensor, only the results of its reductions are kept. It is in the work dtype, unless its stage's
``out_dtype`` rounds it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .expression import Node, Trace, Type, inputs_of, reachable
from .kernel import Kernel, depend_on
from .spec import InputSpec


@dataclass(frozen=True, slots=True)
class Part:
    """The kernel of one stage in a composition.

    Args:
        kernel: the stage's kernel.
        sources: for each input of the kernel, the index of a leaf, or ``~n`` for the first output of part n.
        key: random key of the tensor that the kernel computes.
        positions: for each input, the index of its model in the stage.
        round_to: torch's name of the dtype that the result is rounded to; None to keep it in the work dtype.
    """

    kernel: Kernel
    sources: tuple[int, ...]
    key: int = 0
    positions: tuple[int, ...] = ()
    round_to: str | None = None


class Composition(Kernel):
    """The kernels of several stages; the outputs are those of the last part.

    Args:
        inputs: leaves, which are read from files.
        parts: kernels in topological order.
        byproducts: whether the by-products of the last part are computed, if they need no leaf that no output needs.
    """

    def __init__(self, inputs: InputSpec, parts: Sequence[Part], *, byproducts: bool = True) -> None:
        self.parts = tuple(parts)
        uses_shape = bool(inputs.accesses) or not all(part.kernel.any_shape for part in parts)
        outputs, found = _composed(self.parts)
        used = {index for node in reachable(*outputs) for index in inputs_of(node)}
        known = found if byproducts and depend_on(found, used) else ()
        super().__init__(inputs, outputs, parts[-1].kernel.bound, uses_shape=uses_shape, byproducts=known)

    def resized(self, shape: tuple[int, ...]) -> Composition:
        """The same parts for tensors of another shape."""
        return self.with_parts([replace(part, kernel=part.kernel.resized(shape)) for part in self.parts], shape)

    def with_parts(self, parts: Sequence[Part], shape: tuple[int, ...]) -> Composition:
        """The composition of these parts, which are `self.parts` for tensors of another shape."""
        if not self.any_shape:
            return Composition(self.inputs.resized(shape), parts)
        kernel = copy.copy(self)
        kernel.parts = tuple(parts)
        kernel.inputs, kernel.traced = self.inputs.resized(shape), self.traced.resized(shape)
        return kernel

    def with_used_inputs(self) -> Composition:
        """The same parts without the leaves that the output does not depend on."""
        used = self.used
        if len(used) == self.inputs.count:
            return self
        # a part keeps its number of sources: one that the output does not depend on can be any leaf
        moved = {leaf: used.index(leaf) if leaf in used else 0 for leaf in range(self.inputs.count)}
        parts = [
            replace(part, sources=tuple(moved.get(source, source) for source in part.sources)) for part in self.parts
        ]
        kernel = Composition(self.inputs.selected(used), parts, byproducts=bool(self.byproducts))
        kernel.traced, kernel.kept = self.traced, used
        return kernel


def _composed(parts: Sequence[Part]) -> tuple[list[Node], list[Node]]:
    """The outputs and the by-products of the last part as expressions of the leaves."""
    trace = Trace()
    results: list[Node] = []
    rebuilt: list[Node] = []
    for part in parts:
        sources = [results[~source] if source < 0 else trace.load(source) for source in part.sources]

        def leaf(node: Node, part: Part = part, sources: Sequence[Node] = tuple(sources)) -> Node | None:
            if node.op == "load":
                number: int = node.value
                return sources[number]
            if node.op == "low_rank":
                left, right = (sources[index] for index in node.value)
                if left.op != "load" or right.op != "load":
                    raise ValueError("the factors of a low-rank product must be leaves, and not results of other parts")
                return trace.low_rank(left.value, right.value)
            if node.op == "hash":
                index, stream = node.value
                return trace.hash(index, stream or (part.key, part.positions[index]))
            return None

        kernel = part.kernel
        wanted = (*kernel.outputs, *kernel.byproducts) if part is parts[-1] else kernel.outputs[:1]
        rebuilt = trace.rebuilt(wanted, leaf)
        if part.round_to is not None:
            rebuilt[0] = trace.node("round", (rebuilt[0],), Type.NUMBER, value=part.round_to)
        results.append(rebuilt[0])
    count = len(parts[-1].kernel.outputs)
    return rebuilt[:count], rebuilt[count:]
