"""Mistakes in the definition of a method: each is an error with the file, the line and what to write instead."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from mergeloom.methods import Array, Inputs, MethodError, PerInput, add, exp, host, merge_method, sqrt, where
from mergeloom.methods.kernel.array import ALLOWED
from mergeloom.methods.kernel.expression import MethodDefinitionError
from mergeloom.methods.kernel.spec import InputSpec
from tests.support.methods.kernels import kernel_of, method_of

SHAPE = (4, 5)
UNSUPPORTED: dict[str, Callable[[Array], Any]] = {
    ".mean": lambda x: x.mean(),
    ".T": lambda x: x.T,
    ".shape": lambda x: x.shape[0] * x,
    "torch.median": lambda x: torch.median(x),  # type: ignore[call-overload]
    "torch.abs": lambda x: torch.abs(x),  # type: ignore[arg-type]
    "torch.add": lambda x: torch.ones(5) + x,
    "torch.stack": lambda x: torch.stack([x, x]),  # type: ignore[list-item]
    "numpy.median": lambda x: numpy.median(x),  # type: ignore[call-overload]
    "numpy.sign": lambda x: numpy.sign(x),  # type: ignore[call-overload]
    "numpy.multiply": lambda x: numpy.ones(5) * x,
    "** (write x * x, or use sqrt)": lambda x: x**2,
    "%": lambda x: x % 2,
    "//": lambda x: 7 // x,
    "@": lambda x: x @ x,
    "[...]": lambda x: x[0],
    "iteration": lambda x: add(list(x)),
    "len": lambda x: x * len(x),
    "if, and, or, not, in or a chained comparison": lambda x: x if x > 0 else -x,
    "float (the value is not known yet; use host for Python functions of scalars)": lambda x: x * float(x),
    "int (the value is not known yet; use host for Python functions of scalars)": lambda x: x * int(x),
    "~ of numbers": lambda x: ~x,
    "& or | of numbers": lambda x: x & (x > 0),
    "where with a condition that is not a comparison": lambda x: where(x, x, x),
    "an operand of type str": lambda x: x + "1",
    "an operand of type NoneType": lambda x: x * (x == None),  # noqa: E711
    "an operand of type Tensor": lambda x: x + torch.ones(5),
    "an operand of type ndarray": lambda x: x * numpy.ones(5),
}
"""What an error names, and a method that does it."""

OTHER: dict[str, Callable[[Inputs], Any]] = {
    "host takes scalars, such as t.sum(x), and not arrays": lambda t: host(math.sqrt, t.other),
    "host needs a scalar, such as t.sum(x), among its arguments": lambda t: t.other * host(math.sqrt, 2.0),
    "host takes values per row or values per column, and not both": lambda t: (
        t.other * host(max, t.row_sum(t.other), t.column_sum(t.other))
    ),
    "uniform takes an input, such as one of t.models": lambda t: t.uniform(t.other + 1),
    "kth_largest takes k from 1 to the number of elements, 20, and not 21": lambda t: t.kth_largest(t.other, 21),
    "kth_largest takes k from 1 to the number of elements, 20, and not 0": lambda t: t.kth_largest(t.other, 0),
    "the number of elements must be an int, such as int(0.2 * t.size), and not 4.0": lambda t: (
        t.other * t.largest(t.other, 0.2 * t.size)  # type: ignore[arg-type]
    ),
    "largest takes a number of elements, or a share between 0 and 1, and not 1.5": lambda t: (
        t.other * t.largest(t.other, share=1.5)
    ),
    "largest takes a number of elements, or a share between 0 and 1, and not None": lambda t: t.largest(t.other),
    "at least one operand must be an array": lambda t: add([1.0, 2.0]),
    "ZeroDivisionError: division by zero": lambda t: t.other * (1 / (t.size - 20)),
    "AttributeError: 'Inputs' object has no attribute 'mean'": lambda t: t.mean(t.other),  # type: ignore[attr-defined]
}


def error_of(function: Callable[[Inputs], Any]) -> str:
    """The message of the error of tracing a method."""
    with pytest.raises(MethodDefinitionError) as caught:
        kernel_of(function, 1, None, SHAPE)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_an_unsupported_operation(what: str) -> None:
    function = UNSUPPORTED[what]
    line = function.__code__.co_firstlineno
    message = error_of(lambda t: function(t.other))
    assert message == f"{__file__}:{line}: {what} is not an operation on arrays; allowed: {ALLOWED}"


@pytest.mark.parametrize(
    "function",
    [
        lambda t: t.sum(t.row_sum(t.other)),
        lambda t: t.other * t.sum(t.column_sum(t.other)),
        lambda t: t.other * t.count(t.row_sum(t.other) > 0),
        lambda t: t.other * t.row_max(t.row_sum(t.other)),
        lambda t: t.other * t.largest(t.column_sum(t.other), 3),
    ],
)
def test_a_reduction_of_rows_or_columns(function: Callable[[Inputs], Any]) -> None:
    line = function.__code__.co_firstlineno
    assert error_of(function) == f"{__file__}:{line}: a reduction needs an array with one value per element"


@pytest.mark.parametrize("says", OTHER)
def test_a_misused_function(says: str) -> None:
    message = error_of(OTHER[says])
    code = OTHER[says].__code__
    lines = {line for _, _, line in code.co_lines() if line is not None}
    assert message.startswith(tuple(f"{__file__}:{line}: " for line in lines))
    assert message.endswith(says)


def test_the_operations_that_an_error_lists_exist() -> None:
    import mergeloom.methods

    names = [name for name in ALLOWED.replace(",", "").split() if name.isidentifier()]
    names = [name for name in names if name not in ("comparisons", "abs")]
    assert len(names) > 15
    assert [name for name in names if not hasattr(mergeloom.methods, name) and not hasattr(Inputs, name)] == []


@pytest.mark.parametrize(
    ("result", "kind"),
    [(None, "NoneType"), (1.0, "float"), ([], "list"), (torch.ones(5), "Tensor"), (numpy.ones(5), "ndarray")],
    ids=str,
)
def test_a_method_without_an_array_result(result: Any, kind: str) -> None:
    def method(t: Inputs) -> Any:
        return result

    line = method.__code__.co_firstlineno
    wanted = f"merge method method must return an Array, such as t.base + x, and returns {kind}; allowed: {ALLOWED}"
    assert error_of(method) == f"{__file__}:{line}: {wanted}"


def test_an_array_kept_between_calls() -> None:
    kept: list[Array] = []

    def method(t: Inputs) -> Array:
        kept.append(t.other)
        return kept[0] + t.other

    kernel_of(method, 1, None, SHAPE)
    message = error_of(method)
    line = method.__code__.co_firstlineno + 2
    assert message == f"{__file__}:{line}: an array of another tensor: methods cannot keep arrays between calls"
    for function in (
        lambda t: kept[0],
        lambda t: t.other * t.sum(kept[0]),
        lambda t: t.other * t.count(kept[0] > 0),
        lambda t: t.other * t.largest(kept[0], 3),
        lambda t: t.uniform(kept[0]),
        lambda t: add([t.other, kept[0]]),
        lambda t: where(kept[0] > 0, t.other, 0.0),
        lambda t: t.other * host(max, t.sum(t.other), [kept[1]]),
    ):
        kept[1:] = [kept[0] * 0 + 1]
        assert "methods cannot keep arrays between calls" in error_of(function)


def test_the_line_is_that_of_the_method_where_it_calls_helpers() -> None:
    """The innermost line outside of mergeloom, and for an error of the helper itself the line of the method."""

    def helper(x: Array) -> Array:
        return sqrt(exp(x)) ** 2

    def method(t: Inputs) -> Array:
        return helper(t.other)

    def average(t: Inputs) -> Any:
        return statistics.mean(t.models)  # type: ignore[type-var]

    assert error_of(method).startswith(f"{__file__}:{helper.__code__.co_firstlineno + 1}: ** (write")
    assert "is not an operation on arrays" in error_of(average)


def test_errors_of_a_method_for_its_user_stay_as_they_are() -> None:
    def method(t: Inputs) -> Array:
        raise MethodError("weights must be positive", parameters=["weight"], index=1)

    with pytest.raises(MethodError, match="^weights must be positive$") as caught:
        method_of(method).kernel(InputSpec(3, 0, SHAPE), {})
    assert (caught.value.parameters, caught.value.index) == (("weight",), 2)  # of all inputs, the base included


# --- signatures ------------------------------------------------------------------------------------------------------


def positional(t: Inputs, factor: float = 1.0) -> Array:
    """A method.

    Args:
        factor: a factor.
    """
    return factor * t.other


def textual(t: Inputs, *, factor: str = "1") -> Array:
    """A method.

    Args:
        factor: a factor.
    """
    return t.other


def unknown(t: Inputs, *, factor: Factor = 1.0) -> Array:  # type: ignore[name-defined]  # noqa: F821
    """A method.

    Args:
        factor: a factor.
    """
    return t.other


def undescribed(t: Inputs, *, factor: float = 1.0) -> Array:
    """A method."""
    return factor * t.other


def undocumented(t: Inputs) -> Array:
    return t.other


def number(t: Inputs, *, factor: PerInput[float] = 1.0) -> Array:  # type: ignore[assignment]
    """A method.

    Args:
        factor: a factor.
    """
    return factor[0] * t.other


def unequal(t: Inputs, *, factor: PerInput[float] = (1.0, 2.0)) -> Array:
    """A method.

    Args:
        factor: a factor.
    """
    return factor[0] * t.other


def sound(t: Inputs) -> Array:
    """A method."""
    return t.other


@pytest.mark.usefixtures("forget_methods")
@pytest.mark.parametrize(
    ("function", "says"),
    [
        (positional, "must take the inputs and then keyword-only parameters: (t: 'Inputs', factor: 'float' = 1.0)"),
        (textual, "parameter 'factor' must be a float, int or bool, and only numbers can have a Range: <class 'str'>"),
        (unknown, "name 'Factor' is not defined"),
        (undescribed, "its docstring does not describe 'factor'"),
        (undocumented, "merge method 'mine' has no docstring"),
        (number, "the default of 'factor' must be a tuple of one value, the default of every input: 1.0"),
        (unequal, "the default of 'factor' must be a tuple of one value, the default of every input: (1.0, 2.0)"),
    ],
)
def test_a_wrong_signature(function: Callable[..., Any], says: str) -> None:
    with pytest.raises(TypeError) as caught:
        merge_method("mine")(function)
    message = str(caught.value)
    assert message.startswith(f"{__file__}:{function.__code__.co_firstlineno}: ")
    assert says in message


@pytest.mark.usefixtures("forget_methods")
def test_a_name_that_is_taken() -> None:
    with pytest.raises(TypeError, match=r"test_definition_errors\.py:\d+: a merge method 'ties' is already registered"):
        merge_method("ties")(sound)


def test_a_class_is_not_a_method() -> None:
    with pytest.raises(TypeError, match="'mine' must be a function of Inputs that returns an Array: <class 'object'>"):
        merge_method("mine")(object)
