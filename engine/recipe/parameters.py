"""Resolves the parameters of a recipe for each tensor: scopes, filters, gradients.

The rules are those of mergekit. A per-input parameter (`weight`) is looked up in the slice's source, the slice, the
module and the recipe; a shared one (`t`) in the slice, the module and the recipe; the method's default comes last. In a
list of conditions, the first whose filter matches the tensor's name applies; if none does, the search continues in the
next scope. A list of values is a gradient over the layers of the slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...errors import RecipeError
from ...methods.kernel.method import Method
from ...methods.kernel.ranges import Range
from ...methods.kernel.signature import Parameter
from ...methods.kernel.spec import Base, MethodError
from .nodes import Keys
from .parameter_uses import ParameterUse, Use
from .types import Conditional, Gradient, Module, Recipe, Scalar, Settings, Slice, Stage

_TRUE = frozenset(("true", "t", "yes", "y", "on", "1"))
_FALSE = frozenset(("false", "f", "no", "n", "off", "0"))

_SLACK = 1e-9  # t = i / (count-1) is rounded: 1/49 x 49 is just below 1 in floats, and its floor would be 0


class ParameterError(ValueError):
    """A parameter with an invalid value, or without one."""


class MissingValue(ParameterError):
    """A required parameter without a value."""


def describe(value: object) -> str:
    """Format a value for an error message: shortened, and as a recipe would write it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "nothing"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def coerce(value: Scalar, kind: type) -> float | int | bool:
    """Convert `value` to a float, int or bool.

    As in mergekit, numeric strings are numbers (YAML 1.1 reads ``1e-5`` as a string), and 1, 0 and words such as
    ``yes`` are booleans.

    Raises:
        ParameterError: for anything else, including NaN, infinities, and true or false for a number.
    """
    expected = {float: "a number", int: "a whole number", bool: "true or false"}[kind]
    if kind is bool:
        word = value.strip().lower() if isinstance(value, str) else value
        if word in _TRUE or word == 1:
            return True
        if word in _FALSE or word == 0:
            return False
        raise ParameterError(f"expected {expected}, got {describe(value)}")
    if isinstance(value, bool):
        raise ParameterError(f"expected {expected}, got {describe(value)}")
    try:
        if kind is int and isinstance(value, (int, str)):
            try:
                return int(value)
            except ValueError:
                pass
        number = float(value)
    except (ValueError, OverflowError):
        raise ParameterError(f"expected {expected}, got {describe(value)}") from None
    if not math.isfinite(number):
        raise ParameterError(f"expected {expected}, got {describe(value)}: it must be finite")
    if kind is int:
        if number != math.floor(number):
            raise ParameterError(f"expected {expected}, got {describe(value)}")
        return int(number)
    return number


def accept(value: Scalar, parameter: Parameter) -> float | int | bool:
    """Convert `value` to the parameter's type and check its range.

    Raises:
        ParameterError: for a value of another type, or outside the parameter's range.
    """
    try:
        converted = coerce(value, parameter.type)
    except ParameterError:
        converted = None
    if converted is not None and parameter.accepts(converted):
        return converted
    raise ParameterError(
        f"{parameter.name} must be {parameter.expected}, got {describe(value)}{_suggestion(value, parameter)}"
    )


def _suggestion(value: Scalar, parameter: Parameter) -> str:
    """Suggest the value that was probably meant by an invalid one: a percentage, a decimal comma, the wrong sign."""
    if parameter.type is bool:
        return ""
    text = value.strip().replace(",", ".") if isinstance(value, str) else value
    percent = isinstance(text, str) and text.endswith("%")
    try:
        number = float(text.removesuffix("%") if isinstance(text, str) else text)
    except (ValueError, OverflowError):
        return ""
    guesses = [number / 100] if percent else [number]
    if parameter.type is float and parameter.range is not None and parameter.range.minimum >= 0:
        guesses.append(-number)
    if parameter.range == Range(0, 1) and 5 <= number <= 100:
        guesses.append(number / 100)
    if parameter.type is int:
        guesses = [guess for guess in guesses if guess.is_integer()]
    valid = [guess for guess in guesses if parameter.accepts(guess)]
    return f": did you mean {valid[0]:g}?" if valid else ""


def layer_position(index: int, count: int) -> float:
    """The position of layer `index` in a gradient over `count` layers: from 0 to 1, and 1 for a single layer."""
    if not 0 <= index < count:
        raise ValueError(f"layer {index} of {count}")
    return index / (count - 1) if count > 1 else 1.0


def gradient_value(values: Sequence[float | int | bool], t: float) -> float | int | bool:
    """The value of a gradient at `t` in [0, 1].

    Numbers are interpolated linearly, exact at both ends, and never outside the range of the two neighbours (in
    mergekit they may be, due to rounding). Booleans change in steps: entry floor(t (n-1)).
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
    """Looks up one parameter in a chain of scopes, for any number of tensors.

    Args:
        parameter: the parameter to look up.
        scopes: the settings to search, in order.

    Raises:
        ParameterError: for a value that the parameter doesn't accept.
    """

    __slots__ = ("_at_start", "_counts", "_entries", "constant", "parameter")

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
        self._counts = [0] * end
        self._at_start: list[dict[str, None]] = [{} for _ in range(end)]
        self.constant = len(entries) > 0 and entries[0][0] is None and entries[0][2] is None
        """Whether the value is the same for every tensor and layer."""

    def __call__(self, tensor: str, t: float) -> Any:
        """The value for a tensor.

        Args:
            tensor: tensor name that filters are matched against.
            t: position of the tensor's layer in a gradient.

        Raises:
            MissingValue: if the parameter is required and no scope has a value for this tensor.
            ParameterError: if the gradient of an int is not a whole number at `t`.
        """
        for number, (name, value, curve, _) in enumerate(self._entries):
            if name is None or name in tensor:
                self._counts[number] += 1
                if curve is None:
                    return value
                if t == 0:
                    self._at_start[number][tensor] = None
                return curve[t]
        filtered = ": no filter matches its name" if self._entries else ""
        raise MissingValue(f"`{self.parameter.name}` has no value{filtered}")

    def has_gradient(self, tensor: str) -> bool:
        """Whether the value for a tensor is a gradient over the layers."""
        return next((curve is not None for name, _, curve, _ in self._entries if name is None or name in tensor), False)

    def scope(self, tensor: str) -> int | None:
        """The index of the scope that sets the parameter for a tensor; None if none does."""
        return next((scope for name, *_, scope in self._entries if name is None or name in tensor), None)

    def uses(self) -> tuple[Use, ...]:
        """The values with the tensors that were looked up so far; empty without filters and gradients."""
        if self.constant or not self._entries:
            return ()
        return tuple(
            Use(name, (value,) if curve is None else curve.values_by_layer, scope is None, count, tuple(names))
            for (name, value, curve, scope), count, names in zip(
                self._entries, self._counts, self._at_start, strict=True
            )
        )


class _Curve(dict[float, Any]):
    """A gradient's values by position, cached since all tensors of a layer need the same."""

    def __init__(self, values: tuple[float | int | bool, ...], parameter: Parameter) -> None:
        super().__init__()
        self.values_by_layer = self._values = values
        self._parameter = parameter

    def __missing__(self, t: float) -> Any:
        value = gradient_value(self._values, t)
        if type(self._values[0]) is int:
            nearest = round(value)
            if abs(value - nearest) >= _SLACK:
                message = f"{self._parameter.name} must be a whole number, but its gradient {list(self._values)} is "
                raise ParameterError(f"{message}{value:g} in one of the layers")
            value = nearest
        self[t] = value
        return value


class SliceParameters:
    """Looks up the parameters of a method for the tensors of one slice.

    Args:
        recipe: the recipe, for error messages.
        stage: the slice's stage.
        module: the slice's module (see `types.modules_of`).
        part: the slice.
        method: the stage's merge method.
        base: index of the base model among the slice's sources, or None.

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
        self.constant: Mapping[str, Any] | None = None  # what `values` returns for all tensors, once it is known

    def values(self, output: str, inputs: Sequence[tuple[int, str]], t: float) -> Mapping[str, Any]:
        """The parameters of one output tensor, as `Method.kernel` takes them.

        Args:
            output: name of the output tensor, which the filters of shared parameters are matched against.
            inputs: the index of each source that has the tensor, and the tensor's name there, in the slice's order.
            t: position of the layer in the slice (`layer_position`), 0 outside the layers.

        Returns:
            the values by parameter name, a tuple for each per-input parameter; the base model's entry is a placeholder
            that methods ignore.

        Raises:
            RecipeError: if a required parameter has no value.
        """
        complete = len(inputs) == len(self._sources)
        if complete and self.constant is not None:
            return self.constant
        base = self._base
        try:
            values = {resolver.parameter.name: resolver(output, t) for resolver in self._shared}
            for parameter, resolvers in self._per_input:
                unused = parameter.type() if parameter.required else parameter.default
                values[parameter.name] = tuple([unused if i == base else resolvers[i](name, t) for i, name in inputs])
        except ParameterError as error:
            raise self._lookup_error(output, inputs, t) from error
        if complete and self._constant:
            self.constant = values
        return values

    def gradients(self, output: str, inputs: Sequence[tuple[int, str]], t: float) -> Mapping[str, str]:
        """The parameters of a tensor that have a gradient over the layers, each with its value at `t` as text.

        Args:
            output: name of the output tensor.
            inputs: the inputs as passed to `values`.
            t: position of the layer in the slice.
        """
        found = {r.parameter.name: f"{r(output, t):g}" for r in self._shared if r.has_gradient(output)}
        for parameter, resolvers in self._per_input:
            others = [(i, name) for i, name in inputs if i != self._base]
            if any(resolvers[i].has_gradient(name) for i, name in others):
                texts = (f"{resolvers[i](name, t):g} for {self._sources[i].model.text}" for i, name in others)
                found[parameter.name] = ", ".join(texts)
        return found

    def error(self, output: str, inputs: Sequence[tuple[int, str]], mistake: MethodError) -> RecipeError:
        """The error for values that the method rejects, with the location of the one to change.

        Args:
            output: name of the output tensor.
            inputs: the inputs as passed to `values`.
            mistake: the error raised by `Method.kernel` for these inputs.
        """
        chosen = inputs if mistake.index is None else inputs[mistake.index : mistake.index + 1]
        places = [self._place(name, output, chosen) for name in mistake.parameters]
        place = next((place for place in places if place is not None), self._part.place)
        model = "" if mistake.index is None else f", model {self._sources[chosen[0][0]].model.text}"
        return self._recipe.error(place, f"{self._method.name}{model}, tensor {output}: {mistake}")

    def uses(self) -> Iterator[ParameterUse]:
        """The parameters with filters or gradients, with the tensors that were looked up so far."""
        found: list[tuple[str | None, Resolver]] = [(None, resolver) for resolver in self._shared]
        found += [
            (self._sources[index].model.text, resolver)
            for _, resolvers in self._per_input
            for index, resolver in enumerate(resolvers)
            if index != self._base
        ]
        for model, resolver in found:
            if uses := resolver.uses():
                yield ParameterUse(self._stage.name, resolver.parameter.name, model, uses)

    def _place(self, parameter: str, output: str, inputs: Sequence[tuple[int, str]]) -> Keys | None:
        """The key path that sets a parameter for a tensor; None if nothing sets it, or the inputs' paths differ."""
        shared = [resolver for resolver in self._shared if resolver.parameter.name == parameter]
        places = {self._scope_place(resolver, output, None) for resolver in shared}
        for declared, resolvers in self._per_input:
            if declared.name == parameter:
                places = {self._scope_place(resolvers[i], name, i) for i, name in inputs if i != self._base}
        return places.pop() if len(places) == 1 else None

    def _scope_place(self, resolver: Resolver, tensor: str, source: int | None) -> Keys | None:
        """The key path that sets a resolver's value for a tensor; None for a default."""
        scope = resolver.scope(tensor)
        if scope is None:
            return None
        places = self._places if source is None else (self._sources[source].place, *self._places)
        return (*places[scope], "parameters", resolver.parameter.name)

    def _lookup_error(self, output: str, inputs: Sequence[tuple[int, str]], t: float) -> RecipeError:
        """The error for the first value that is missing or invalid."""
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
                name = resolver.parameter.name
                misspelt = (each for each in self._recipe.warnings if each.suggestion == name)
                if (warning := next(misspelt, None)) is not None:
                    mistake = "in the wrong place" if warning.place[-1:] == (name,) else "misspelt"
                    advice = f"is it {mistake}? {warning.located_problem}"
                message = f"{self._method.name}{model}, tensor {tensor}: {error}; {advice}"
                return self._recipe.error(self._stage.place if source is None else source.place, message)
            except ParameterError as error:
                place = self._scope_place(resolver, tensor, index) or self._part.place
                return self._recipe.error(place, f"{self._method.name}{model}, tensor {tensor}: {error}")
        raise AssertionError("every parameter has a value")
