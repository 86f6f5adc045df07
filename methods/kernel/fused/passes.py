"""Runs the passes of a kernel over chunks of bytes with compiled loops. Imports neither torch nor a GPU's libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..expression import Node
from ..kernel import State
from ..reduction.reductions import Selection
from ..reduction.selection import Threshold, sample_indices
from ..spec import Unit
from .compiled import Compiled
from .formats import STORED
from .rows import address
from .run import Chunk, Run

_FAR = 1 << 62


class FusedPass:
    """One pass of a kernel over the chunks that a thread computes.

    Args:
        compiled: compiled loops of the kernel.
        index: number of the pass; None for the pass that computes the output.
        state: state after the passes before it.
        scratch: scratch memory of the thread, at least `compiled.scratch` bytes, aligned to 64 bytes.

    Attributes:
        byproducts: partial result of each by-product for the chunk that was combined last.
    """

    def __init__(self, compiled: Compiled, index: int | None, state: State | None, scratch: Any) -> None:
        self._compiled = compiled
        self._kernel = compiled.kernel
        self._state = state
        self._scratch = scratch
        self._active: tuple[int, ...] = () if index is None else self._kernel.active(index, state)
        self._first = index is not None and self._kernel.step(index) == 0
        self.byproducts: list[list[float]] = []

    def combine(self, chunk: Chunk, *outs: Any) -> bool:
        """Write the elements of a chunk of each output to a buffer, rounded once; NaNs are the dtype's canonical NaN.

        Returns:
            Whether a value of any output was NaN or beyond the largest number of its dtype.
        """
        run = self._run("output", chunk)
        for number, out in enumerate(outs):
            run.addresses["output", ~number] = address(out)
        beyond = run.compute()
        first = len(self._kernel.reduced)
        self.byproducts = [run.result(first + number) for number in range(len(self._kernel.byproducts))]
        return beyond

    def reduce(self, chunk: Chunk) -> list[Any]:
        """The partial result of each reduction for a chunk; None for those that the pass does not continue."""
        results: list[Any] = [None] * len(self._kernel.reduced)
        sampled: dict[str, list[int]] = {}
        counted: dict[str, list[int]] = {}
        for number in self._active:
            node = self._kernel.reduced[number]
            if not isinstance(node.value, Selection):
                counted.setdefault(f"reduce_{node.level}", []).append(number)
            else:
                samples = self._first and node.value.sampled
                (sampled if samples else counted).setdefault(f"select_{node.level}", []).append(number)
        for name, numbers in counted.items():
            run = self._run(name, chunk, numbers)
            run.compute()
            for number in numbers:
                results[number] = run.result(number)
        for name, numbers in sampled.items():
            bits = self._sampled(name, chunk)
            for number in numbers:
                results[number] = [[bits[number]] if bits else []]
        return results

    def _run(self, name: str, chunk: Chunk, active: Sequence[int] = ()) -> Run:
        return Run(self._compiled, self._compiled.groups[name], chunk, self._state, self._scratch, active, self._cut)

    def _sampled(self, name: str, chunk: Chunk) -> dict[int, Any]:
        """The bits of the sampled magnitudes of each selection of a group."""
        size = next(t.reduction.size for t in self._compiled.groups[name].targets if isinstance(t.reduction, Selection))
        indices = sample_indices(size, chunk.element, chunk.elements)
        if not len(indices):
            return {}
        gathered = self._aligned(chunk, lambda data, width: np.frombuffer(data, np.dtype(f"u{width}"))[indices])
        part = gathered._replace(elements=len(indices), indices=chunk.element + indices)
        return self._magnitudes(name, part)

    def _aligned(self, chunk: Chunk, part: Callable[[Any, int], Any]) -> Chunk:
        """A chunk with a part of each aligned input, which a function takes of its data and bytes per element."""
        inputs = self._kernel.inputs
        parts = [
            part(data, STORED[dtype].bits // 8) if inputs.access(index).aligned else data
            for index, (data, dtype) in enumerate(zip(chunk.inputs, self._compiled.dtypes, strict=True))
        ]
        own = [(chunk.element, chunk.elements)] * len(parts)
        return chunk._replace(inputs=parts, staged=chunk.staged or own)

    def _magnitudes(self, name: str, chunk: Chunk) -> dict[int, Any]:
        """The bits of all magnitudes of a chunk for each selection of a group."""
        run = self._run(name, chunk)
        bits = {t.number: np.empty(chunk.elements, np.int32) for t in run.group.targets}
        for number, each in bits.items():
            run.addresses["operand", number] = each.ctypes.data
        run.compute(keep=True)
        return bits

    def _cut(self, node: Node, chunk: Chunk) -> int:
        """The index of the element at which those equal to a threshold are no longer selected.

        Args:
            node: node of the threshold.
            chunk: chunk that is computed.
        """
        threshold: Threshold = self._scalar(node)
        reduced = node.args[0]
        block = reduced.value.block
        begin: int = threshold.block * block
        within = begin - chunk.element
        if chunk.indices is not None:  # no operand that is sampled depends on a selection: the result is not used
            return min(begin, _FAR)
        if not threshold.ties or not 0 <= within < chunk.elements:
            return min(begin, _FAR)
        kernel = self._kernel
        unit = 1 if kernel.unit is Unit.ELEMENT else kernel.height * max(1, kernel.inputs.columns)
        # the magnitudes can depend on complete rows, or rows of blocks
        low, high = within - within % unit, min(-(-(within + block) // unit) * unit, chunk.elements)
        sliced = self._aligned(chunk, lambda data, width: memoryview(data).cast("B")[low * width : high * width])
        part = sliced._replace(element=chunk.element + low, elements=high - low)
        # another run uses the same scratch memory, so it comes first
        bits = self._magnitudes(f"select_{reduced.level}", part)[self._kernel.reduced.index(reduced)]
        equal = np.flatnonzero(bits[within - low :] == np.float32(threshold.value).view(np.int32))
        return begin + int(equal[threshold.ties - 1]) + 1

    def _scalar(self, node: Node) -> Any:
        assert self._state is not None
        return self._state.scalars[id(node)]
