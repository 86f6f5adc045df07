"""What a merge method is: its declaration, its passes over tiles, and the registry.

A method is declared once, with the names, types and defaults of its parameters. Bound to the inputs and the resolved
parameters of one output tensor it becomes a `Kernel`: a few reductions over the tiles of the inputs, and then one
`combine` that makes each tile of the output. The planner reads a kernel's declarations, the executor calls its passes.
Nothing here knows of files, devices, names or budgets, and nothing here imports torch before a tile exists.
"""

from __future__ import annotations

import functools
import inspect
import keyword
import math
import re
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from .ranges import Finite, Fraction, HalfWidth, NonNegative, NonNegativeInt, Positive, PositiveInt, Range

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
"""Elements in one block of a reduction. Block boundaries lie at multiples of it, whatever the tiles."""

_PER_INPUT = "per input"
ARITHMETIC_VERSION = 1
"""Raised with every change of the bytes that any recipe makes: of a method, of the blocks of a sum, of rounding, of
random numbers. An unfinished merge is resumed only by the version that began it."""

T = TypeVar("T")
PerInput = Annotated[tuple[T, ...], _PER_INPUT]
"""A parameter with one value for each input of the tensor, in recipe order. In a method's signature its default is a
tuple of one value, the default of every input. A method with a base takes no notice of the base's own value."""


class MethodError(ValueError):
    """A parameter's value, or the number of inputs, that the method can't work with; says what would do.

    Args:
        message: the mistake, and what to write instead.
        parameters: names of the parameters to change, as in the recipe, the likeliest first.
        index: the input whose values of these are wrong; None for shared parameters, or several inputs.
    """

    def __init__(self, message: str, *, parameters: Sequence[str] = (), index: int | None = None) -> None:
        super().__init__(message)
        self.parameters = tuple(parameters)
        self.index = index


class Base(Enum):
    """What a method does with the recipe's base model."""

    NONE = "none"  # it has no place for one: a base among the inputs is an input like any other
    OPTIONAL = "optional"
    REQUIRED = "required"


class Absent(Enum):
    """What a method makes of an optional tensor (a head, a bias) that only some of the inputs have."""

    PRESENT = "merges the ones that are there"
    BASE_PRESENT = "merges the ones that are there, if the base has it"
    SINGLE = "passes a single one through"
    SINGLE_BASE = "passes a single one through, if it is the base's"


class Unit(Enum):
    """What a tile must hold whole."""

    ELEMENT = "element"
    ROW = "row"
    TENSOR = "tensor"


REQUIRED: Any = inspect.Parameter.empty


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method, as a recipe may set it.

    Args:
        name: as in the recipe.
        type: float, int or bool.
        default: its default (of each input, where each has its own), or `REQUIRED`.
        per_input: whether each input has its own value.
        doc: one sentence.
        range: the numbers that it accepts; None for a bool, or where the method declares no range.
    """

    name: str
    type: type
    default: Any
    per_input: bool
    doc: str
    range: Range | None = None

    @property
    def required(self) -> bool:
        """Whether a recipe must set it: for every input but the base, where each has its own."""
        return self.default is REQUIRED

    @property
    def argument(self) -> str:
        """Its name in the method's signature: with an underscore where Python keeps the word for itself (`lambda_`)."""
        return f"{self.name}_" if keyword.iskeyword(self.name) else self.name

    @property
    def values(self) -> str:
        """The values that it accepts, in a few words: ``between 0 and 1``, ``true or false``."""
        return "true or false" if self.type is bool else str(self.range or Range())

    @property
    def expected(self) -> str:
        """The values that it accepts, in words that fit after "must be": `values` and, of an int, its type."""
        if self.type is not int:
            return "a finite number" if self.type is float and self.values == str(Range()) else self.values
        return "a whole number" + ("" if self.values == str(Range()) else f" ({self.values})")

    def accepts(self, value: float | int | bool) -> bool:
        """Whether a value of its type is in its range."""
        return self.type is bool or value in (self.range or Range())


@dataclass(frozen=True)
class Inputs:
    """What a method is told of the inputs of one output tensor.

    Args:
        count: how many inputs there are, the base included.
        base: which of them is the base model's, or None.
        shape: of every input and of the output.
    """

    count: int
    base: int | None
    shape: tuple[int, ...]

    @functools.cached_property
    def others(self) -> tuple[int, ...]:
        """The inputs that are not the base, in recipe order."""
        return tuple(i for i in range(self.count) if i != self.base)

    @property
    def rows(self) -> int:
        """Rows of the tensor: all dimensions but the last; 1 for a vector."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows

    @property
    def columns(self) -> int:
        """Elements in a row: the last dimension; 1 for a 0-d tensor."""
        return self.shape[-1] if self.shape else 1


class Kernel(ABC):
    """A method bound to the inputs and parameters of one output tensor.

    The passes over the tiles are `reductions` reductions, numbered from 0, and then `combine`. Of a reduction the
    engine makes `state = finish(i, merged, state)`, where `merged` is what `reduce` returned for the tiles, put
    together by `merge` in the order of the elements. `merge` is associative, so that neighbouring tiles may be merged
    first: it adds integers or puts sequences end to end, and sums of floats wait for `finish`. Partials and states are
    Python numbers, small tensors on the CPU, and what holds them.

    A kernel's results may depend on the elements, the parameters and the random key, never on where tiles begin and
    end: a tile begins at a multiple of `alignment` elements and ends at one or at the tensor's end.
    """

    unit: Unit = Unit.ELEMENT
    """What a tile holds whole."""

    reductions: int = 0
    """How many reductions come before `combine`."""

    buffers: float = 4
    """Workspace of a tile, in units of one work element (4 bytes, 8 for float64) for each element of the tile; see
    `workspace`. The planner measures the kernel, too, and reserves the larger of the two."""

    random: bool = False
    """Whether `combine` or a reduction uses the tile's random key, so that the output tensor's name matters."""

    copies: int | None = None
    """The input that the output equals, value for value: no arithmetic is needed. None for any other kernel."""

    propagates_nonfinite: bool = False
    """Whether a NaN or an infinity in any input always shows in the output, so that that alone need be checked."""

    bound: tuple[Method, Mapping[str, Any]] | None = None
    """The method and the parameters that made the kernel; None for one that was made without a method."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def resized(self, shape: tuple[int, ...]) -> Kernel:
        """The same method and parameters for tensors of another shape.

        Raises:
            TypeError: for a kernel that was made without a method.
        """
        if self.bound is None:
            raise TypeError(f"{type(self).__name__} was made without a method")
        method, parameters = self.bound
        return method.kernel(replace(self.inputs, shape=shape), parameters)

    @property
    def alignment(self) -> int:
        """Tiles begin at multiples of this many elements."""
        if self.unit is Unit.ELEMENT:
            return BLOCK
        if self.unit is Unit.ROW:
            return max(1, self.inputs.columns)
        return max(1, self.inputs.rows * self.inputs.columns)

    def workspace(self, elements: int, itemsize: int) -> int:
        """Bytes of workspace for a tile of so many elements, where a work element takes `itemsize` bytes."""
        return math.ceil(self.buffers * elements) * itemsize + 64 * 64  # each buffer begins at a multiple of 64

    def needed(self, index: int, state: Any) -> bool:
        """Whether reduction `index` can still change the state; the engine may leave it out where it can't."""
        return True

    def reduce(self, index: int, tile: Tile, state: Any) -> Any:
        """The partial result of reduction `index` over one tile. Exact, or of fixed blocks: see `Kernel`."""
        raise TypeError(f"{type(self).__name__} has no reductions")

    def merge(self, index: int, merged: Any, partial: Any) -> Any:
        """`partial` added to what the tiles before it gave (None at first): lists are put end to end."""
        return partial if merged is None else merged + partial

    def finish(self, index: int, merged: Any, state: Any) -> Any:
        """The state after reduction `index`; `merged` is None where the tensor has no elements."""
        raise TypeError(f"{type(self).__name__} has no reductions")

    @abstractmethod
    def combine(self, tile: Tile, state: Any) -> Tensor:
        """The output's elements for one tile, in the tile's work dtype, not yet rounded to the output's."""


Bind = Callable[..., Kernel]
"""``bind(inputs, **parameters)``; raises MethodError."""


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method, as a recipe names it.

    Args:
        name: as in a recipe's ``merge_method``.
        summary: one line.
        description: what it does, with the formula.
        paper: where it comes from: a link, or None.
        base: what it does with a base model.
        minimum: the fewest inputs it works on, the base not counted.
        maximum: the most, the base not counted, or None.
        absent: what it makes of an optional tensor that only some inputs have.
        parameters: what a recipe may set, in the order of the signature.
        bind: makes the kernel for one output tensor.
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

    def kernel(self, inputs: Inputs, parameters: Mapping[str, Any]) -> Kernel:
        """The kernel for one output tensor.

        Args:
            inputs: of the tensor.
            parameters: values by the names that recipes use, a tuple where each input has its own; the defaults hold
                for those left out.

        Raises:
            MethodError: for a value, or a number of inputs, that it can't work with.
        """
        if unknown := parameters.keys() - {p.name for p in self.parameters}:
            raise MethodError(f"{self.name} has no parameter {', '.join(sorted(unknown))}")
        if self.base is Base.NONE:
            inputs = replace(inputs, base=None)
        others = len(inputs.others)
        if others < self.minimum or (self.maximum is not None and others > self.maximum):
            most = "or more" if self.maximum is None else f"to {self.maximum}"
            number = str(self.minimum) if self.maximum == self.minimum else f"{self.minimum} {most}"
            raise MethodError(f"{self.name} takes {number} models{_BESIDES[self.base]}, and there are {others}")
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
                    continue  # the base has no value of its own
                if not parameter.accepts(number):
                    raise MethodError(
                        f"{parameter.name} must be {parameter.expected}, got {number:g}",
                        parameters=[parameter.name],
                        index=index if parameter.per_input else None,
                    )
            arguments[parameter.argument] = value
        kernel = self.bind(inputs, **arguments)
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
    """Register a merge method: a `Kernel` class, or a function, called as ``bind(inputs, **parameters)``.

    The keyword-only arguments are the recipe's parameters: annotated ``float``, ``int``, ``bool``, a number with a
    range (`Fraction`, or ``Annotated[float, Range(0, 2)]``), or ``PerInput[...]`` of these where each input has its
    own. The docstring's first line is the summary; an ``Args:`` section describes the parameters, one each.

    Raises:
        TypeError: at registration, for a signature that can't be a method's, or a default out of its range.
    """

    def register(bind: Bind) -> Bind:
        if name in _REGISTRY:
            raise TypeError(f"a merge method {name!r} is registered already")
        doc = inspect.cleandoc(bind.__doc__ or "")
        if not doc:
            raise TypeError(f"merge method {name!r} has no docstring")
        description, descriptions = _split_docstring(doc)
        _REGISTRY[name] = Method(
            name=name,
            summary=description.split("\n", 1)[0],
            description=description,
            paper=paper,
            base=base,
            minimum=minimum,
            maximum=maximum,
            absent=absent or (Absent.PRESENT if base is Base.NONE else Absent.BASE_PRESENT),
            parameters=_parameters(name, bind, descriptions),
            bind=bind,
        )
        return bind

    return register


def registered() -> Mapping[str, Method]:
    """Every registered method by name."""
    return _REGISTRY


def unregister(name: str) -> None:
    """Forget a registered method."""
    del _REGISTRY[name]


def _parameters(name: str, bind: Bind, descriptions: Mapping[str, str]) -> tuple[Parameter, ...]:
    target = bind.__init__ if inspect.isclass(bind) else bind
    hints = typing.get_type_hints(target, include_extras=True)
    signature = inspect.signature(bind)
    positional = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    if len(positional) != 1:
        raise TypeError(f"merge method {name!r} must take the inputs and then keyword-only parameters: {signature}")
    found = []
    for parameter in signature.parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints.get(parameter.name)
        kind, accepted, per_input = _schema(hint)
        if kind not in (float, int, bool) or (kind is bool and accepted is not None):
            raise TypeError(
                f"merge method {name!r}: parameter {parameter.name!r} must be a float, int or bool, and only a "
                f"number has a Range: {hint}"
            )
        if parameter.name not in descriptions:
            raise TypeError(f"merge method {name!r}: its docstring does not describe {parameter.name!r}")
        default = parameter.default
        if per_input and default is not REQUIRED:
            (default,) = default
        declared = Parameter(
            parameter.name.rstrip("_"), kind, default, per_input, descriptions[parameter.name], accepted
        )
        if not (declared.required or declared.accepts(default)):
            raise TypeError(
                f"merge method {name!r}: the default of {parameter.name!r} must be {declared.expected}: {default}"
            )
        found.append(declared)
    return tuple(found)


def _schema(hint: Any) -> tuple[Any, Range | None, bool]:
    """The type, the range and whether each input has its own value, of an annotation such as PerInput[Fraction]."""
    per_input = typing.get_origin(hint) is Annotated and _PER_INPUT in hint.__metadata__
    if per_input:
        hint = typing.get_args(typing.get_args(hint)[0])[0]
    if typing.get_origin(hint) is not Annotated:
        return hint, None, per_input
    ranges = [item for item in hint.__metadata__ if isinstance(item, Range)]
    return hint.__origin__, ranges[-1] if ranges else None, per_input


def _split_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """The text before ``Args:``, and the description of each argument after it."""
    head, _, tail = doc.partition("\nArgs:\n")
    descriptions: dict[str, str] = {}
    current = ""
    for line in tail.splitlines():
        if line.strip() and not line.startswith(" "):
            break
        match = re.match(r"    (\w+): (.*)", line)
        if match:
            current = match[1]
            descriptions[current] = match[2].strip()
        elif current:
            descriptions[current] = f"{descriptions[current]} {line.strip()}".strip()
    return head.strip(), descriptions


def only(values: Sequence[T], what: str) -> T:
    """The single one of `values`; raises MethodError otherwise."""
    if len(values) != 1:
        raise MethodError(f"it takes exactly one {what}, and there are {len(values)}")
    return values[0]


def base_of(inputs: Inputs) -> int:
    """Which input is the base; raises MethodError where none is."""
    if inputs.base is None:
        raise MethodError("it needs a base model among the inputs")
    return inputs.base
