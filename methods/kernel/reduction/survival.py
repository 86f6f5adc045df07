"""How much of a change survives rounding: two sums over the elements of an output, computed in the pass that stores it.

With b the base's value, v the value that is stored and q what it is rounded to, they are the sums of (q - b)(v - b) and
of (v - b)^2. Their quotient is the share of the change v - b that is left along its direction: 1 if rounding is
harmless, 0 if it undoes the change. They are by-products of a kernel: what is needed is in registers, nothing is read
for them, and they are as independent of tiles and backends as any other sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..expression import Extent, Node, Trace, Type, reachable
from ..kernel import Kernel, Traceable
from ..spec import InputSpec
from .reductions import Sum

SUMS = 2
"""Number of sums."""


def survival_sums(trace: Trace, value: Node, stored: Node, base: Node, reduction: type[Sum] = Sum) -> tuple[Node, ...]:
    """The nodes of the two sums, that with the stored value first.

    Args:
        trace: trace of the nodes.
        value: value before it is rounded.
        stored: value that a reader of the output has.
        base: value of the base model.
        reduction: kind of the sums.
    """
    change = trace.arithmetic("sub", value, base)
    kept = trace.arithmetic("sub", stored, base)
    products = trace.arithmetic("mul", kept, change), trace.arithmetic("mul", change, change)
    return tuple([trace.node("reduce", (each,), Type.WIDE, Extent.TENSOR, reduction(), 1) for each in products])


@dataclass(frozen=True, slots=True)
class Compared:
    """A method whose output is compared with the base when it is rounded.

    Args:
        method: the method.
        base: index of the base among the method's inputs.
        dtype: torch's name of the dtype that the output is stored in.
    """

    method: Traceable
    base: int
    dtype: str

    @property
    def name(self) -> str:
        """Name of the method in recipes."""
        return self.method.name

    @property
    def function(self) -> Any:
        """The method's code."""
        return self.method.function

    def kernel(self, inputs: InputSpec, parameters: Mapping[str, Any]) -> Kernel:
        """Trace the method for the inputs that it uses; without sums if it copies one, or does not use the base."""
        kernel = self.method.kernel(inputs, parameters).with_used_inputs()
        loads = {node.value: node for node in reachable(*kernel.outputs) if node.op == "load"}
        place = kernel.kept.index(self.base) if self.base in kernel.kept else -1
        if kernel.copies is not None or place not in loads:
            return kernel
        trace = Trace()
        stored = trace.node("round", (kernel.output,), Type.NUMBER, value=self.dtype)
        sums = survival_sums(trace, kernel.output, stored, loads[place])
        bound, uses_shape = (self, dict(parameters)), not kernel.any_shape
        compared = Kernel(kernel.inputs, kernel.outputs, bound, uses_shape=uses_shape, byproducts=sums)
        compared.traced, compared.kept = kernel.traced, kernel.kept
        return compared
