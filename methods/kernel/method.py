"""Merge methods: their declaration, their binding to the inputs of a tensor, and the methods that are registered.

A method is a function from symbolic arrays to a symbolic array; see `language`. Its keyword-only arguments are the
parameters that recipes can set. This module does not depend on files, devices, tensor names or budgets, and does not
import torch.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from .array import ALLOWED, KEPT, Array
from .expression import Extent, MethodDefinitionError, Node, Trace, Type
from .kernel import Kernel
from .language import Inputs
from .signature import REQUIRED, Parameter, read_parameters, split_docstring
from .spec import Absent, Base, InputSpec, MethodError

Function = Callable[..., Any]
"""``function(inputs, **parameters)`` returns the output as an `Array`; raises MethodError."""

F = TypeVar("F", bound=Function)

_BESIDES = {Base.NONE: "", Base.OPTIONAL: " besides a base", Base.REQUIRED: " besides the base"}


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
        function: computes the output from symbolic inputs.
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
    function: Function

    def __repr__(self) -> str:
        """One line with the name and the summary."""
        return f"<Method {self.name}: {self.summary}>"

    def kernel(self, inputs: InputSpec, parameters: Mapping[str, Any]) -> Kernel:
        """Trace the method for one output tensor.

        Args:
            inputs: inputs of the tensor.
            parameters: values by recipe name, with a tuple of one value per input, the base included, for a per-input
                parameter; missing ones take their default.

        Raises:
            MethodError: a value or the number of inputs is invalid.
            MethodDefinitionError: the method uses an operation that does not exist, or returns no array.
        """
        if unknown := parameters.keys() - {p.name for p in self.parameters}:
            raise MethodError(f"{self.name} has no parameter {', '.join(sorted(unknown))}")
        if self.base is Base.NONE:
            inputs = replace(inputs, base=None)
        self._check_inputs(inputs)
        arguments = {p.argument: self._argument(p, inputs, parameters) for p in self.parameters}
        symbolic = Inputs(inputs)
        try:
            outputs = traced(f"merge method {self.name}", self.function, [symbolic], arguments, symbolic.trace)
        except MethodError as error:
            if error.index is not None:
                error.index = inputs.others[error.index]
            raise
        kernel = Kernel(inputs, outputs, (self, dict(parameters)), uses_shape=symbolic.uses_shape)
        symbolic.shared = kernel.any_shape
        return kernel

    def check(self) -> None:
        """Trace the method for sample inputs and parameters, so a mistake shows before a recipe uses the method.

        Raises:
            MethodDefinitionError: see `kernel`.
        """
        for others in sorted({self.minimum, max(self.minimum, min(2, self.maximum or 2))}):
            count = others + (self.base is Base.REQUIRED)
            spec = InputSpec(count, 0 if self.base is Base.REQUIRED else None, (8, 16))
            required = [parameter for parameter in self.parameters if parameter.required]
            parameters = {p.name: (p.sample,) * count if p.per_input else p.sample for p in required}
            with contextlib.suppress(MethodError):  # the sample parameters may not fit together
                self.kernel(spec, parameters)

    def _check_inputs(self, inputs: InputSpec) -> None:
        others = len(inputs.others)
        if others < self.minimum or (self.maximum is not None and others > self.maximum):
            most = "or more" if self.maximum is None else f"to {self.maximum}"
            number = str(self.minimum) if self.maximum == self.minimum else f"{self.minimum} {most}"
            raise MethodError(
                f"{self.name} takes {number} model{'' if number == '1' else 's'}{_BESIDES[self.base]}, got {others}"
            )
        if self.base is Base.REQUIRED and inputs.base is None:
            raise MethodError(f"{self.name} needs a base model among the inputs")

    def _argument(self, parameter: Parameter, inputs: InputSpec, parameters: Mapping[str, Any]) -> Any:
        """The value of a parameter; for a per-input parameter, those of the inputs other than the base."""
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
        return tuple(value[index] for index in inputs.others) if parameter.per_input else value


def traced(
    name: str, function: Function, args: Sequence[Any], parameters: Mapping[str, Any], trace: Trace, count: int = 1
) -> list[Node]:
    """The nodes of the arrays that a function of symbolic arrays returns, each with one number of the work dtype per
    element; those of all but the first may have one per block.

    Args:
        name: what the function is, for error messages.
        function: the function.
        args: its positional arguments.
        parameters: its keyword arguments.
        trace: trace of the symbolic arrays.
        count: number of arrays that it returns, as a tuple if there are several.

    Raises:
        MethodError: the function raises it.
        MethodDefinitionError: the function raises another exception, or does not return arrays of the trace.
    """
    try:
        result = function(*args, **parameters)
    except (MethodError, MethodDefinitionError):
        raise
    except Exception as error:
        raise MethodDefinitionError(f"{_line_in(function, error)}: {name}: {type(error).__name__}: {error}") from error
    results = result if count > 1 and isinstance(result, tuple) else (result,)
    if len(results) != count:
        found = f"{name} must return {count} arrays, and returns {len(results)}"
        raise MethodDefinitionError(f"{_line_in(function)}: {found}")
    for each in results:
        if not isinstance(each, Array):
            raise MethodDefinitionError(
                f"{_line_in(function)}: {name} must return an Array, such as t.base + x, and returns "
                f"{type(each).__name__}; allowed: {ALLOWED}"
            )
        if each.trace is not trace:
            raise MethodDefinitionError(f"{_line_in(function)}: {name} returns {KEPT}")
    return [_as_output(each.node, trace, first=number == 0) for number, each in enumerate(results)]


def _line_in(function: Function, error: BaseException | None = None) -> str:
    """The file and line of a method: where an error left its code, or else its first line."""
    code = function.__code__
    line = code.co_firstlineno
    trace = error.__traceback__ if error else None
    while trace is not None:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == code.co_filename else line
        trace = trace.tb_next
    return f"{code.co_filename}:{line}"


def _as_output(node: Node, trace: Trace, *, first: bool) -> Node:
    """A result as one number of the work dtype per element, or per block if it is not the first one."""
    number = trace.narrow(trace.number(node)) if node.in_tile else node
    if number.extent is Extent.ELEMENT or (number.extent is Extent.BLOCK and not first):
        return number
    return trace.node("fill", (number,), Type.NUMBER, Extent.ELEMENT)


_REGISTRY: dict[str, Method] = {}


def merge_method(
    name: str,
    *,
    paper: str | None = None,
    base: Base = Base.NONE,
    minimum: int = 1,
    maximum: int | None = None,
    absent: Absent | None = None,
) -> Callable[[F], F]:
    """Register a merge method: a function that is called as ``function(inputs, **parameters)``.

    Its keyword-only arguments are the parameters that recipes can set. They are annotated as ``float``, ``int``,
    ``bool``, a number with a range (`Fraction`, or ``Annotated[float, Range(0, 2)]``), or ``PerInput[...]`` of one of
    these for one value per input other than the base. The first line of the docstring is the summary; its ``Args:``
    section describes each parameter.

    Raises:
        TypeError: the signature is not valid for a method, or a default is out of its range.
    """

    def register(function: F) -> F:
        if not inspect.isfunction(function):
            raise TypeError(f"merge method {name!r} must be a function of Inputs that returns an Array: {function!r}")
        doc = inspect.cleandoc(function.__doc__ or "")
        description, descriptions = split_docstring(doc)
        try:
            if name in _REGISTRY:
                raise TypeError(f"a merge method {name!r} is already registered")
            if not doc:
                raise TypeError(f"merge method {name!r} has no docstring")
            parameters = read_parameters(name, function, descriptions)
        except (NameError, TypeError) as error:
            raise TypeError(f"{_line_in(function)}: {error}") from error
        _REGISTRY[name] = Method(
            name=name,
            summary=description.split("\n", 1)[0],
            description=description,
            paper=paper,
            base=base,
            minimum=minimum,
            maximum=maximum,
            absent=absent or (Absent.PRESENT if base is Base.NONE else Absent.BASE_PRESENT),
            parameters=parameters,
            function=function,
        )
        return function

    return register


def registered() -> Mapping[str, Method]:
    """All registered methods by name."""
    return _REGISTRY


def unregister(name: str) -> None:
    """Remove a method from the registry."""
    del _REGISTRY[name]
