"""What a recipe's parameters are worth for one tensor: scopes, filters, gradients.

The rules are mergekit's. A per-input parameter (`weight`) is looked up in the slice's source, the slice, the module
and the recipe; a shared one (`t`) in the slice, the module and the recipe; the method's default comes last. In a list
of conditions the first whose filter fits the tensor's name holds, and where none fits the search goes on in the next
scope. A list is a gradient over the layers of the slice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import RecipeError
from ...methods.kernel.contract import Base, Method, MethodError, Parameter, Range
from .types import Conditional, Gradient, Module, Recipe, Scalar, Settings, Slice, Stage
from .yaml import Keys

_TRUE = frozenset(("true", "t", "yes", "y", "on", "1"))
_FALSE = frozenset(("false", "f", "no", "n", "off", "0"))

_SLACK = 1e-9  # t = i / (count-1) is rounded: 1/49 x 49 is just below 1 in floats, and its floor would be 0


class ParameterError(ValueError):
    """A value that a parameter can't take, or a parameter without one."""


class MissingValue(ParameterError):
    """A required parameter without a value."""


def describe(value: object) -> str:
    """A value for an error message: short, and as it is written in a recipe."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "nothing"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def coerce(value: Scalar, kind: type) -> float | int | bool:
    """`value` as a float, int or bool.

    As in mergekit, numeric texts count as numbers (YAML 1.1 reads ``1e-5`` as text), and 1, 0 and words such as ``yes``
    as booleans.

    Raises:
        ParameterError: for anything else: NaN, infinities, and true or false for a number.
    """
    wanted = {float: "a number", int: "a whole number", bool: "true or false"}[kind]
    if kind is bool:
        word = value.strip().lower() if isinstance(value, str) else value
        if word in _TRUE or word == 1:
            return True
        if word in _FALSE or word == 0:
            return False
        raise ParameterError(f"expected {wanted}, and found {describe(value)}")
    if isinstance(value, bool):
        raise ParameterError(f"expected {wanted}, and found {describe(value)}")
    try:
        if kind is int and isinstance(value, (int, str)):
            try:
                return int(value)
            except ValueError:
                pass
        number = float(value)
    except (ValueError, OverflowError):
        raise ParameterError(f"expected {wanted}, and found {describe(value)}") from None
    if not math.isfinite(number):
        raise ParameterError(f"expected {wanted}, and found {describe(value)}: it must be finite")
    if kind is int:
        if number != math.floor(number):
            raise ParameterError(f"expected {wanted}, and found {describe(value)}")
        return int(number)
    return number


def accept(value: Scalar, parameter: Parameter) -> float | int | bool:
    """`value` as a parameter's float, int or bool, if the parameter accepts it.

    Raises:
        ParameterError: for a value of another type, or outside the parameter's range.
    """
    try:
        found = coerce(value, parameter.type)
    except ParameterError:
        found = None
    if found is not None and parameter.accepts(found):
        return found
    raise ParameterError(
        f"{parameter.name} must be {parameter.expected}, got {describe(value)}{_suggestion(value, parameter)}"
    )


def _suggestion(value: Scalar, parameter: Parameter) -> str:
    """The value that was probably meant by one that `parameter` doesn't accept: percent, a decimal comma, a sign."""
    if parameter.type is bool:
        return ""
    text = value.strip().replace(",", ".") if isinstance(value, str) else value
    percent = isinstance(text, str) and text.endswith("%")
    try:
        number = float(text.removesuffix("%") if isinstance(text, str) else text)
    except (ValueError, OverflowError):
        return ""
    meant = [number / 100] if percent else [number]
    if parameter.type is float and parameter.range is not None and parameter.range.minimum >= 0:
        meant.append(-number)
    if parameter.range == Range(0, 1) and 5 <= number <= 100:
        meant.append(number / 100)
    whole = parameter.type is int
    fitting = [guess for guess in meant if parameter.accepts(guess) and not (whole and not guess.is_integer())]
    return f": did you mean {fitting[0]:g}?" if fitting else ""


def layer_position(index: int, count: int) -> float:
    """Where layer `index` of a slice of `count` layers stands in a gradient: from 0 to 1, and 1 in a slice of one."""
    if not 0 <= index < count:
        raise ValueError(f"layer {index} of {count}")
    return index / (count - 1) if count > 1 else 1.0


def gradient_value(values: Sequence[float | int | bool], t: float) -> float | int | bool:
    """The value of a gradient at `t` in [0, 1].

    Numbers are linear between neighbours, exact at both ends, and never outside the two neighbours (mergekit's may be,
    by a rounding). Booleans step: entry floor(t (n-1)).
    """
    last = len(values) - 1
    position = t * last
    if isinstance(values[0], bool):
        return values[min(last, max(0, math.floor(position + _SLACK)))]
    left = min(last, max(0, math.floor(position)))
    right = min(last, left + 1)
    share = position - left
    low, high = sorted((values[left], values[right]))
    return min(high, max(low, (1 - share) * values[left] + share * values[right]))


class Resolver:
    """One parameter in one chain of scopes, ready to be looked up for many tensors.

    Args:
        parameter: of a method.
        scopes: the settings in which it is looked up, in order.

    Raises:
        ParameterError: for a value that the parameter doesn't accept.
    """

    __slots__ = ("_entries", "constant", "parameter")

    def __init__(self, parameter: Parameter, scopes: Sequence[Settings]) -> None:
        self.parameter = parameter
        entries: list[tuple[str | None, Any, _Curve | None, int | None]] = []
        for number, scope in enumerate(scopes):
            setting = scope.get(parameter.name)
            if setting is None:
                continue
            conditions = setting if isinstance(setting, tuple) else (Conditional(None, setting),)
            for condition in conditions:
                name = None if condition.filter in (None, "", "*") else condition.filter
                if not isinstance(condition.value, Gradient):
                    entries.append((name, accept(condition.value, parameter), None, number))
                elif condition.value.values:
                    values = tuple(accept(value, parameter) for value in condition.value.values)
                    curve = _Curve(values, parameter) if len(set(values)) > 1 else None
                    entries.append((name, values[0], curve, number))
        if not parameter.required:
            entries.append((None, parameter.default, None, None))
        end = next((count for count, entry in enumerate(entries, 1) if entry[0] is None), len(entries))
        self._entries = tuple(entries[:end])
        self.constant = len(entries) > 0 and entries[0][0] is None and entries[0][2] is None
        """Whether it has the same value for every tensor and layer."""

    def __call__(self, tensor: str, t: float) -> Any:
        """The value for a tensor.

        Args:
            tensor: the name that filters are held against.
            t: where the tensor's layer stands in a gradient.

        Raises:
            MissingValue: where the parameter is required and no scope has a value for this tensor.
            ParameterError: where the gradient of an int has no whole value at `t`.
        """
        for name, value, curve, _ in self._entries:
            if name is None or name in tensor:
                return value if curve is None else curve[t]
        filtered = ": no filter fits its name" if self._entries else ""
        raise MissingValue(f"`{self.parameter.name}` has no value{filtered}")

    def scope(self, tensor: str) -> int | None:
        """The index of the scope that sets the parameter for a tensor; None where none does."""
        return next((scope for name, *_, scope in self._entries if name is None or name in tensor), None)


class _Curve(dict[float, Any]):
    """A gradient's values by t: as many as a slice has layers, and many tensors ask for each."""

    def __init__(self, values: tuple[float | int | bool, ...], parameter: Parameter) -> None:
        super().__init__()
        self._values = values
        self._parameter = parameter

    def __missing__(self, t: float) -> Any:
        value = gradient_value(self._values, t)
        if type(self._values[0]) is int:
            nearest = round(value)
            if abs(value - nearest) >= _SLACK:
                message = f"{self._parameter.name} must be a whole number, and its gradient {list(self._values)} is "
                raise ParameterError(f"{message}{value:g} in one of the layers")
            value = nearest
        self[t] = value
        return value


class SliceParameters:
    """The parameters of a method in one slice, looked up for each of its tensors.

    Args:
        recipe: says where a mistake stands.
        stage: to which the slice belongs.
        module: to which the slice belongs (see `recipe.modules_of`).
        part: the slice.
        method: the stage's.
        base: which of the slice's sources is the base model's, where the method has a place for one.

    Raises:
        RecipeError: for a value that a parameter doesn't accept.
    """

    def __init__(
        self, recipe: Recipe, stage: Stage, module: Module, part: Slice, method: Method, base: int | None
    ) -> None:
        self._recipe = recipe
        self._stage = stage
        self._method = method
        self._part = part
        self._sources = part.sources
        self._base = base if method.base is not Base.NONE else None
        scopes = (part.parameters, module.parameters, stage.parameters)
        self._places = (part.place, module.place, stage.place)
        try:
            self._shared = tuple(Resolver(p, scopes) for p in method.parameters if not p.per_input)
            self._per_input = tuple(
                (p, tuple(Resolver(p, (source.parameters, *scopes)) for source in part.sources))
                for p in method.parameters
                if p.per_input
            )
        except ParameterError as error:
            raise recipe.error(part.place, str(error)) from error
        constant = [resolver.constant for resolver in self._shared]
        for _, resolvers in self._per_input:
            constant += [resolver.constant for index, resolver in enumerate(resolvers) if index != self._base]
        self._constant = all(constant)
        self._all: Mapping[str, Any] | None = None

    def values(self, output: str, inputs: Sequence[tuple[int, str]], t: float) -> Mapping[str, Any]:
        """The parameters of one output tensor, as `Method.kernel` takes them.

        Args:
            output: its name, against which shared parameters' filters are held.
            inputs: those that have the tensor, in the slice's order: the source's number, and its tensor's name there.
            t: where its layer stands in the slice (`layer_position`), 0 outside the layers.

        Returns:
            values by name, a tuple where each input has its own; the base's own is a stand-in, of which methods take
            no notice.

        Raises:
            RecipeError: where a required parameter has no value, naming model and tensor.
        """
        whole = len(inputs) == len(self._sources)
        if whole and self._all is not None:
            return self._all
        base = self._base
        try:
            found = {resolver.parameter.name: resolver(output, t) for resolver in self._shared}
            for parameter, resolvers in self._per_input:
                stand_in = parameter.type() if parameter.required else parameter.default
                found[parameter.name] = tuple([stand_in if i == base else resolvers[i](name, t) for i, name in inputs])
        except ParameterError as error:
            raise self._blame(output, inputs, t) from error
        if whole and self._constant:
            self._all = found
        return found

    def error(self, output: str, inputs: Sequence[tuple[int, str]], mistake: MethodError) -> RecipeError:
        """The error for values that the method can't work with, with the place of the one to change.

        Args:
            output: as in `values`.
            inputs: as in `values`.
            mistake: as raised by `Method.kernel` for these inputs.
        """
        chosen = inputs if mistake.index is None else inputs[mistake.index : mistake.index + 1]
        places = [self._place(name, output, chosen) for name in mistake.parameters]
        place = next((place for place in places if place is not None), self._part.place)
        model = "" if mistake.index is None else f", model {self._sources[chosen[0][0]].model.text}"
        return self._recipe.error(place, f"{self._method.name}{model}, tensor {output}: {mistake}")

    def _place(self, parameter: str, output: str, inputs: Sequence[tuple[int, str]]) -> Keys | None:
        """Where a tensor's value of a parameter is set; None where nothing sets it, or each input's is elsewhere."""
        shared = [resolver for resolver in self._shared if resolver.parameter.name == parameter]
        found = {self._scope_place(resolver, output, None) for resolver in shared}
        for declared, resolvers in self._per_input:
            if declared.name == parameter:
                found = {self._scope_place(resolvers[i], name, i) for i, name in inputs if i != self._base}
        return found.pop() if len(found) == 1 else None

    def _scope_place(self, resolver: Resolver, tensor: str, source: int | None) -> Keys | None:
        """Where the scope that a resolver takes a tensor's value from sets it; None for a default."""
        scope = resolver.scope(tensor)
        if scope is None:
            return None
        places = self._places if source is None else (self._sources[source].place, *self._places)
        return (*places[scope], "parameters", resolver.parameter.name)

    def _blame(self, output: str, inputs: Sequence[tuple[int, str]], t: float) -> RecipeError:
        """The error for the first value that can't be had."""
        lookups: list[tuple[Resolver, str, int | None]] = [(resolver, output, None) for resolver in self._shared]
        for _, resolvers in self._per_input:
            lookups += [(resolvers[i], name, i) for i, name in inputs if i != self._base]
        for resolver, tensor, index in lookups:
            source = None if index is None else self._sources[index]
            model = "" if source is None else f", model {source.model.text}"
            try:
                resolver(tensor, t)
            except MissingValue as error:
                advice = "set it in the recipe's `parameters`"
                if source is not None:
                    advice = "set it in the model's `parameters`, or for all models in the recipe's"
                meant = f"did you mean `{resolver.parameter.name}`?"
                misspelt = [warning for warning in self._recipe.warnings if warning.endswith(meant)]
                if misspelt:
                    advice = f"is it misspelt? {misspelt[0].partition(', ignored;')[0]}"
                message = f"{self._method.name}{model}, tensor {tensor}: {error}; {advice}"
                return self._recipe.error(self._stage.place if source is None else source.place, message)
            except ParameterError as error:
                place = self._scope_place(resolver, tensor, index) or self._part.place
                return self._recipe.error(place, f"{self._method.name}{model}, tensor {tensor}: {error}")
        raise AssertionError("every parameter has a value")
