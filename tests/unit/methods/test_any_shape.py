"""Kernels for several shapes share their expressions if the method does not ask for the shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mergeloom.methods import Array, Inputs, host, merge_methods
from mergeloom.methods.kernel.composition import Composition, Part
from mergeloom.methods.kernel.fused.compiled import Compiled
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.spec import HostError, InputSpec, Unit
from tests.support.methods.cases import CASES, Case, make
from tests.support.methods.kernels import method_of, run_kernel

SHAPES = ((67, 499), (12,), (), (3, 5, 7), (0, 4))
SHARED = {"linear", "passthrough", "slerp", "task_arithmetic", "dare_linear", "model_stock"}
"""Methods of which some case is the same for any shape."""


def traced(case: Case, shape: tuple[int, ...]) -> Kernel:
    """The kernel of a case, traced for a shape."""
    return merge_methods()[case.method].kernel(InputSpec(case.models, case.base, shape), case.parameters)


def described(kernel: Kernel) -> tuple[object, ...]:
    """Everything that the engine asks of a kernel, the machine code included."""
    compiled = Compiled(kernel, ["BF16"] * kernel.inputs.count, "BF16")
    facts = kernel.inputs, kernel.traced, kernel.kept, kernel.unit, kernel.alignment, kernel.reductions
    more = kernel.random, kernel.copies, kernel.used, kernel.propagates_nonfinite
    return (*facts, *more, kernel.workspace(1 << 15, 4), compiled.assembly, compiled.scratch, compiled.allocated)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resized_kernel_is_the_one_traced_for_the_shape(case: Case) -> None:
    for first in SHAPES[:2]:
        kernel = traced(case, first)
        for shape in SHAPES:
            assert described(kernel.resized(shape)) == described(traced(case, shape))
            if kernel.any_shape:
                used = kernel.with_used_inputs().resized(shape)
                assert described(used) == described(traced(case, shape).with_used_inputs())


def test_which_methods_share_their_expressions() -> None:
    shared = {case.method for case in CASES if traced(case, (8, 16)).any_shape}
    assert shared >= SHARED
    for case in CASES:
        kernel = traced(case, (8, 16))
        assert (kernel.resized((4,)).output is kernel.output) is kernel.any_shape
        assert not kernel.any_shape or kernel.unit is Unit.ELEMENT


def test_a_resized_composition_computes_the_same() -> None:
    slerp, linear = Case("slerp", 2, 0, {"t": 0.3}), Case("linear", 2, None, {"weight": (0.7, 0.3)})

    def composed(shape: tuple[int, ...]) -> Composition:
        parts = [Part(traced(slerp, shape), (0, 1)), Part(traced(linear, shape), (~0, 1))]
        return Composition(InputSpec(2, None, shape), parts)

    shape = (67, 499)
    expected, found = composed(shape), composed((8, 16)).resized(shape)
    assert found.any_shape
    assert [part.kernel.inputs.shape for part in found.parts] == [shape, shape]
    assert described(found) == described(expected)
    inputs = make("lattice", 2, shape, 0)
    found_values, expected_values = (run_kernel(each, inputs).output for each in (found, expected))
    assert found_values.numpy().tobytes() == expected_values.numpy().tobytes()


def late(t: Inputs) -> Array:
    """A method that asks for the number of elements when its reduction is known."""
    return t.models[0] * host(lambda total: total / t.size, t.sum(t.models[0]))


def later(t: Inputs) -> Array:
    """The same, hidden in an argument's default value of an inner function."""

    def mean(total: float, inputs: Inputs = t) -> float:
        return total / inputs.size

    return t.models[0] * host(lambda total: mean(total), t.sum(t.models[0]))


def latest(t: Inputs) -> Array:
    """The same, in a method of an object."""
    return t.models[0] * host(Mean(t).of, t.sum(t.models[0]))


def listed(t: Inputs) -> Array:
    """The same, in a list."""
    return t.models[0] * host(lambda total: total / held[0].size, t.sum(t.models[0])) if (held := [t]) else t.models[0]


def attribute(t: Inputs) -> Array:
    """The same, in a function's attribute."""

    def mean(total: float) -> float:
        return total / vars(mean)["inputs"].size

    vars(mean)["inputs"] = t
    return t.models[0] * host(mean, t.sum(t.models[0]))


class Mean:
    """Computes the mean from the sum."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def of(self, total: float) -> float:
        """Return the mean."""
        return total / self._inputs.size


@pytest.mark.parametrize("function", [late, later, latest, listed, attribute])
def test_a_function_that_asks_for_the_shape_between_passes_is_not_shared(function: Callable[[Inputs], Array]) -> None:
    method = method_of(function)
    kernel = method.kernel(InputSpec(1, None, (8, 16)), {})
    assert not kernel.any_shape
    inputs = [torch.full((4, 5), 3.0)]
    assert torch.equal(run_kernel(kernel.resized((4, 5)), inputs).output, torch.full((4, 5), 9.0))


def test_a_recursive_function_is_shared() -> None:
    def halved(t: Inputs) -> Array:
        def half(total: float) -> float:
            return total if abs(total) < 1 else half(total / 2)

        return t.models[0] * host(half, t.sum(t.models[0]))

    kernel = method_of(halved).kernel(InputSpec(1, None, (8, 16)), {})
    assert kernel.any_shape
    values = run_kernel(kernel.resized((4, 5)), [torch.full((4, 5), 3.0)]).output
    assert torch.equal(values, torch.full((4, 5), 3 * 60 / 64))


HELD: list[Inputs] = []


def test_a_shape_that_is_asked_for_too_late_is_an_error() -> None:
    def hidden(t: Inputs) -> Array:
        HELD.append(t)
        return t.models[0] * host(lambda total: total / HELD[0].size, t.sum(t.models[0]))

    kernel = method_of(hidden).kernel(InputSpec(1, None, (8, 16)), {})
    with pytest.raises(HostError, match="must get the shape from the method"):
        run_kernel(kernel.resized((4, 5)), [torch.full((4, 5), 3.0)])
