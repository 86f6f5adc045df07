"""The interface of a merge method: its declaration, its kernel, and the methods that are registered.

A method declares the names, types and defaults of its parameters. Binding it to the inputs and the parameter values of
one output tensor gives a `Kernel`: zero or more reductions over the tiles of the inputs, then one `combine` pass that
computes each tile of the output. The planner reads the kernel's attributes, the executor calls its passes. This module
does not depend on files, devices, tensor names or budgets, and does not import torch.
"""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from .ranges import Finite, Fraction, HalfWidth, NonNegative, NonNegativeInt, Positive, PositiveInt, Range
from .signature import REQUIRED, Parameter, PerInput, T, read_parameters, split_docstring

if TYPE_CHECKING:
    from torch import Tensor

    from .tile import Tile

__all__ = [
    "BLOCK",
    "REQUIRED",
    "Absent",
    "Base",
    "Bind",
    "Finite",
    "Fraction",
    "HalfWidth",
    "Inputs",
    "Kernel",
    "Method",
    "MethodError",
    "NonNegative",
    "NonNegativeInt",
    "Parameter",
    "PerInput",
    "Positive",
    "PositiveInt",
    "Range",
    "Unit",
    "base_of",
    "merge_method",
    "only",
    "registered",
    "unregister",
]

BLOCK = 1 << 15
"""Elements in one block of a reduction. Block boundaries do not depend on the tiles."""

ARITHMETIC_VERSION = 1
"""Incremented by every change that alters the bytes of any output: a method, the blocks of a sum, rounding, random
numbers. Only the version that started a merge can resume it."""


class MethodError(ValueError):
    """An invalid parameter value or number of inputs.

    Args:
        message: what is wrong and what to write instead.
        parameters: names in the recipe of the parameters to change, the most likely one first.
        index: index of the input that has the invalid values; None for shared parameters and for several inputs.
    """

    def __init__(self, message: str, *, parameters: Sequence[str] = (), index: int | None = None) -> None:
        super().__init__(message)
        self.parameters = tuple(parameters)
        self.index = index


class Base(Enum):
    """How a method uses the recipe's base model."""

    NONE = "none"  # a base model is an input like any other
    OPTIONAL = "optional"
    REQUIRED = "required"


class Absent(Enum):
    """How a method handles an optional tensor (a head, a bias) that only some inputs have."""

    PRESENT = "merges the ones that are there"
    BASE_PRESENT = "merges the ones that are there, if the base has it"
    SINGLE = "passes a single one through"
    SINGLE_BASE = "passes a single one through, if it is the base's"


class Unit(Enum):
    """The unit that tiles do not split."""

    ELEMENT = "element"
    ROW = "row"


@dataclass(frozen=True)
class Inputs:
    """The inputs of one output tensor.

    Args:
        count: number of inputs, including the base.
        base: index of the base model's input, or None.
        shape: shape of every input and of the output.
    """

    count: int
    base: int | None
    shape: tuple[int, ...]

    @functools.cached_property
    def others(self) -> tuple[int, ...]:
        """The indices of the inputs other than the base, in recipe order."""
        return tuple(i for i in range(self.count) if i != self.base)

    @property
    def rows(self) -> int:
        """The number of rows: the product of all dimensions except the last; 1 for a vector."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows

    @property
    def columns(self) -> int:
        """The number of elements in a row: the last dimension; 1 for a 0-d tensor."""
        return self.shape[-1] if self.shape else 1


class Kernel(ABC):
    """A method bound to the inputs and parameters of one output tensor.

    A kernel passes over the tiles `reductions` times, numbered from 0, and then once more for `combine`. After each
    reduction the engine computes `state = finish(i, merged, state)`, where `merged` joins the results of `reduce` for
    all tiles with `merge`, in element order. `merge` must be associative, because the engine can merge adjacent tiles
    first: it adds integers or concatenates sequences, and leaves sums of floats to `finish`. Partial results and states
    are Python numbers, small CPU tensors, or containers of these.

    Results can depend on the elements, the parameters and the random key, but never on the tile boundaries. A tile
    starts at a multiple of `alignment` elements, and ends at one or at the end of the tensor.
    """

    unit: Unit = Unit.ELEMENT
    """The unit that tiles do not split."""

    reductions: int = 0
    """The number of reductions before `combine`."""

    workspace_per_element: float = 4
    """Workspace per element of a tile, in units of the work dtype (4 bytes, 8 for float64); see `workspace`. The
    planner also measures the kernel and reserves the larger of the two."""

    random: bool = False
    """Whether a pass uses the tile's random key, which depends on the name of the output tensor."""

    copies: int | None = None
    """Index of the input that the kernel copies without arithmetic; None for any other kernel."""

    propagates_nonfinite: bool = False
    """Whether a NaN or an infinity in any input always reaches the output. If so, only the output is checked."""

    bound: tuple[Method, Mapping[str, Any]] | None = None
    """The method and the parameters that created the kernel; None for one created without a method."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def resized(self, shape: tuple[int, ...]) -> Kernel:
        """The kernel of the same method and parameters for another shape.

        Raises:
            TypeError: the kernel was created without a method.
        """
        if self.bound is None:
            raise TypeError(f"{type(self).__name__} was created without a method")
        method, parameters = self.bound
        return method.kernel(replace(self.inputs, shape=shape), parameters)

    @property
    def alignment(self) -> int:
        """The number of elements that tile boundaries are a multiple of."""
        return BLOCK if self.unit is Unit.ELEMENT else max(1, self.inputs.columns)

    def workspace(self, elements: int, itemsize: int) -> int:
        """The size in bytes of the workspace for a tile of `elements` elements in a work dtype of `itemsize` bytes."""
        return math.ceil(self.workspace_per_element * elements) * itemsize + 64 * 64  # buffers are aligned to 64 bytes

    def needed(self, index: int, state: Any) -> bool:
        """Whether reduction `index` can still change the state; the engine skips it otherwise."""
        return True

    def reduce(self, index: int, tile: Tile, state: Any) -> Any:
        """The partial result of reduction `index` for one tile: exact, or one value per block of a fixed size."""
        raise TypeError(f"{type(self).__name__} has no reductions")

    def merge(self, index: int, merged: Any, partial: Any) -> Any:
        """Add a tile's partial result to that of the tiles before it (None at first). Lists are concatenated."""
        return partial if merged is None else merged + partial

    def finish(self, index: int, merged: Any, state: Any) -> Any:
        """The state after reduction `index`; `merged` is None for a tensor without elements."""
        raise TypeError(f"{type(self).__name__} has no reductions")

    @abstractmethod
    def combine(self, tile: Tile, state: Any) -> Tensor:
        """The output elements of one tile in the work dtype, before rounding to the output dtype."""


Bind = Callable[..., Kernel]
"""``bind(inputs, **parameters)``; raises MethodError."""


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method.

    Args:
        name: value of ``merge_method`` in a recipe.
        summary: description in one line.
        description: full description with the formula.
        paper: URL of the publication, or None.
        base: how the method uses a base model.
        minimum: minimum number of inputs, not counting the base.
        maximum: maximum number of inputs, not counting the base, or None.
        absent: how the method handles an optional tensor that only some inputs have.
        parameters: parameters in the order of the signature.
        bind: creates the kernel for one output tensor.
    """

    name: str
    summary: str
    description: str
    paper: str | None
    base: Base
    minimum: int
    maximum: int | None
    absent: Absent
    parameters: tuple[Parameter, ...]
    bind: Bind

    def __repr__(self) -> str:
        """One line with the name and the summary."""
        return f"<Method {self.name}: {self.summary}>"

    def kernel(self, inputs: Inputs, parameters: Mapping[str, Any]) -> Kernel:
        """Bind the method to one output tensor.

        Args:
            inputs: inputs of the tensor.
            parameters: values by recipe name, with a tuple for a per-input parameter; missing ones take their default.

        Raises:
            MethodError: a value or the number of inputs is invalid.
        """
        if unknown := parameters.keys() - {p.name for p in self.parameters}:
            raise MethodError(f"{self.name} has no parameter {', '.join(sorted(unknown))}")
        if self.base is Base.NONE:
            inputs = replace(inputs, base=None)
        others = len(inputs.others)
        if others < self.minimum or (self.maximum is not None and others > self.maximum):
            most = "or more" if self.maximum is None else f"to {self.maximum}"
            number = str(self.minimum) if self.maximum == self.minimum else f"{self.minimum} {most}"
            raise MethodError(
                f"{self.name} takes {number} model{'' if number == '1' else 's'}{_BESIDES[self.base]}, got {others}"
            )
        if self.base is Base.REQUIRED and inputs.base is None:
            raise MethodError(f"{self.name} needs a base model among the inputs")
        arguments: dict[str, Any] = {}
        for parameter in self.parameters:
            value = parameters.get(parameter.name, parameter.default)
            if value is REQUIRED:
                raise MethodError(f"{self.name} needs the parameter {parameter.name}")
            if parameter.per_input and parameter.name not in parameters:
                value = (value,) * inputs.count
            for index, number in enumerate(value if parameter.per_input else (value,)):
                if parameter.per_input and index == inputs.base:
                    continue  # methods ignore the value of the base
                if not parameter.accepts(number):
                    raise MethodError(
                        f"{parameter.name} must be {parameter.expected}, got {number:g}",
                        parameters=[parameter.name],
                        index=index if parameter.per_input else None,
                    )
            arguments[parameter.argument] = value
        kernel = self.bind(inputs, **arguments)
        if not isinstance(kernel, Kernel):  # a user's method
            raise UsageError(f"merge method {self.name} must return a Kernel, and returns {type(kernel).__name__}")
        kernel.bound = self, dict(parameters)
        return kernel


_BESIDES = {Base.NONE: "", Base.OPTIONAL: " besides a base", Base.REQUIRED: " besides the base"}


_REGISTRY: dict[str, Method] = {}


def merge_method(
    name: str,
    *,
    paper: str | None = None,
    base: Base = Base.NONE,
    minimum: int = 1,
    maximum: int | None = None,
    absent: Absent | None = None,
) -> Callable[[Bind], Bind]:
    """Register a merge method: a `Kernel` class or a function that is called as ``bind(inputs, **parameters)``.

    Its keyword-only arguments are the parameters that recipes can set. They are annotated as ``float``, ``int``,
    ``bool``, a number with a range (`Fraction`, or ``Annotated[float, Range(0, 2)]``), or ``PerInput[...]`` of one of
    these for one value per input. The first line of the docstring is the summary; its ``Args:`` section describes each
    parameter.

    Raises:
        TypeError: the signature is not valid for a method, or a default is out of its range.
    """

    def register(bind: Bind) -> Bind:
        if name in _REGISTRY:
            raise TypeError(f"a merge method {name!r} is already registered")
        doc = inspect.cleandoc(bind.__doc__ or "")
        if not doc:
            raise TypeError(f"merge method {name!r} has no docstring")
        description, descriptions = split_docstring(doc)
        _REGISTRY[name] = Method(
            name=name,
            summary=description.split("\n", 1)[0],
            description=description,
            paper=paper,
            base=base,
            minimum=minimum,
            maximum=maximum,
            absent=absent or (Absent.PRESENT if base is Base.NONE else Absent.BASE_PRESENT),
            parameters=read_parameters(name, bind, descriptions),
            bind=bind,
        )
        return bind

    return register


def registered() -> Mapping[str, Method]:
    """All registered methods by name."""
    return _REGISTRY


def unregister(name: str) -> None:
    """Remove a method from the registry."""
    del _REGISTRY[name]


def only(values: Sequence[T], what: str) -> T:
    """The only element of `values`. Raises MethodError if there are none or several."""
    if len(values) != 1:
        raise MethodError(f"the method takes exactly one {what}, got {len(values)}")
    return values[0]


def base_of(inputs: Inputs) -> int:
    """The index of the base model's input. Raises MethodError if there is none."""
    if inputs.base is None:
        raise MethodError("the method needs a base model among the inputs")
    return inputs.base
