"""Reads the parameters of a merge method from its Python signature and docstring."""

from __future__ import annotations

import inspect
import math
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from .ranges import Range

_PER_INPUT = "per input"

T = TypeVar("T")
PerInput = Annotated[tuple[T, ...], _PER_INPUT]
"""A parameter with one value per input of the tensor, in recipe order. Its default in a method's signature is a tuple
with a single value, the default of every input. Methods with a base model ignore the value of the base."""

REQUIRED: Any = inspect.Parameter.empty


@dataclass(frozen=True, slots=True)
class Doc:
    """The description of a parameter, in the annotation of a parameter that several methods have.

    Args:
        text: description in one sentence.
    """

    text: str


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a method, which recipes can set.

    Args:
        name: name of the parameter in recipes.
        type: float, int or bool.
        default: default value (of every input for a per-input parameter), or `REQUIRED`.
        per_input: whether each input has its own value.
        doc: description in one sentence.
        range: accepted numbers; None for a bool, and for a method that declares no range.
        argument: name in the method's signature. It has a trailing underscore (`lambda_`) where the name itself is a
            Python keyword or taken.
    """

    name: str
    type: type
    default: Any
    per_input: bool
    doc: str
    range: Range | None = None
    argument: str = ""

    def __repr__(self) -> str:
        """One line with the name, type, default and description."""
        default = "required" if self.required else f"default {self.default}"
        scope = " for each model" if self.per_input else ""
        return f"<Parameter {self.name}{scope}: {self.type.__name__}, {default}: {self.doc}>"

    @property
    def required(self) -> bool:
        """Whether recipes must set it; a per-input parameter for every input except the base."""
        return self.default is REQUIRED

    @property
    def values(self) -> str:
        """The accepted values in a few words: ``between 0 and 1``, ``true or false``."""
        return "true or false" if self.type is bool else str(self.range or Range())

    @property
    def expected(self) -> str:
        """The accepted values as a phrase that follows "must be": `values`, preceded by the type for an int."""
        if self.type is not int:
            return "a finite number" if self.type is float and self.values == str(Range()) else self.values
        return "a whole number" + ("" if self.values == str(Range()) else f" ({self.values})")

    @property
    def sample(self) -> float | int | bool:
        """A value that the parameter accepts."""
        if self.type is bool:
            return False
        limits = self.range or Range()
        bounds = [x for x in (limits.minimum, limits.maximum) if math.isfinite(x)]
        candidates = [0.5, 1.0, 2.0, *bounds, sum(bounds) / len(bounds) if bounds else 0.0]
        fitting = [self.type(x) for x in candidates if self.type(x) in limits]
        sample: float | int = fitting[0] if fitting else self.type(bounds[0])
        return sample

    def accepts(self, value: float | int | bool) -> bool:
        """Whether a value of the parameter's type is in its range."""
        return self.type is bool or value in (self.range or Range())


def read_parameters(name: str, function: Callable[..., Any], descriptions: Mapping[str, str]) -> tuple[Parameter, ...]:
    """The keyword-only arguments of a method as parameters.

    Args:
        name: name of the method, for error messages.
        function: function that declares the parameters.
        descriptions: descriptions from the docstring; the others are in the annotations.

    Raises:
        TypeError: the signature is not valid for a method.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)
    positional = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    if len(positional) != 1:
        raise TypeError(f"merge method {name!r} must take the inputs and then keyword-only parameters: {signature}")
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints.get(parameter.name)
        value_type, accepted, per_input, doc = _schema(hint)
        doc = descriptions.get(parameter.name, doc)
        if value_type not in (float, int, bool) or (value_type is bool and accepted is not None):
            raise TypeError(
                f"merge method {name!r}: parameter {parameter.name!r} must be a float, int or bool, and only "
                f"numbers can have a Range: {hint}"
            )
        if not doc:
            raise TypeError(f"merge method {name!r}: its docstring does not describe {parameter.name!r}")
        default = parameter.default
        if per_input and default is not REQUIRED:
            if not (isinstance(default, tuple) and len(default) == 1):
                raise TypeError(
                    f"merge method {name!r}: the default of {parameter.name!r} must be a tuple of one value, the "
                    f"default of every input: {default}"
                )
            (default,) = default
        declared = Parameter(parameter.name.rstrip("_"), value_type, default, per_input, doc, accepted, parameter.name)
        if not (declared.required or declared.accepts(default)):
            raise TypeError(
                f"merge method {name!r}: the default of {parameter.name!r} must be {declared.expected}: {default}"
            )
        parameters.append(declared)
    return tuple(parameters)


def _schema(hint: Any) -> tuple[Any, Range | None, bool, str]:
    """Split an annotation such as PerInput[Fraction] into its type, its range, whether each input has a value, and its
    description."""
    per_input = typing.get_origin(hint) is Annotated and _PER_INPUT in hint.__metadata__
    if per_input:
        hint = typing.get_args(typing.get_args(hint)[0])[0]
    if typing.get_origin(hint) is not Annotated:
        return hint, None, per_input, ""
    ranges = [item for item in hint.__metadata__ if isinstance(item, Range)]
    docs = [item.text for item in hint.__metadata__ if isinstance(item, Doc)]
    return hint.__origin__, ranges[-1] if ranges else None, per_input, docs[-1] if docs else ""


def split_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """Split a docstring into the text before ``Args:`` and the description of each argument."""
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
