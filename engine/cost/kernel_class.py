"""Classes of kernels that take the same memory, so one of each is measured."""

from __future__ import annotations

from typing import Any

from ...methods.kernel.composition import Composition
from ...methods.kernel.kernel import Kernel


def kernel_class(kernel: Kernel) -> tuple[Any, ...]:
    """Return a key of everything that a kernel's memory depends on, except shapes and dtypes.

    Of a number among the parameters it has only the comparisons with 0 and 1, by which methods choose their code path.
    """
    if isinstance(kernel, Composition):
        return tuple((kernel_class(part.kernel), part.sources, part.round_to) for part in kernel.parts)
    method, parameters = kernel.bound
    values = tuple((name, _class(value)) for name, value in sorted(parameters.items()))
    inputs = kernel.inputs
    accesses = tuple(map(type, inputs.accesses))
    return method.function, inputs.count, inputs.base, accesses, kernel.reductions, kernel.height, values


def _class(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_class, value))
    return value if isinstance(value, (bool, str)) else ((value > 0) - (value < 0), (value > 1) - (value < 1))
