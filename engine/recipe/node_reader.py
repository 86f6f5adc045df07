"""Reads the values of a recipe's nodes. A value of the wrong type is an error with its line and key path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ...errors import RecipeError
from ...io.tensors.dtypes import BF16, F16, F32, F64, DType
from ...methods.kernel.method import Method
from ...methods.kernel.signature import Parameter
from .entries.reference_reader import read_reference
from .entries.rename_reader import Renames
from .local import range_problem
from .misplaced import (
    MISSING,
    dtype_advice,
    key_advice,
    list_advice,
    names_adapter,
    nearest,
    parameter_advice,
)
from .nodes import Keys, Node, Origins
from .parameters import ParameterError, accept, coerce, describe
from .types import UNKNOWN_METHOD, Conditional, Gradient, ModelReference, Scalar, Setting
from .warnings import RecipeWarning, WarningKind

T = TypeVar("T")

DTYPES = {"bfloat16": BF16, "float16": F16, "float32": F32, "float64": F64}

IGNORED = frozenset(("int8_mask", "residual_weight"))
"""Keys and parameters of mergekit without effect on the result; skipped without a warning."""


_ADAPTER_FORM = "unknown key; for a model with a LoRA adapter, write `model: {}+adapter`"


def describe_node(node: Node) -> str:
    """Describe a node for an error message."""
    if isinstance(node.value, Mapping):
        return "a mapping"
    if isinstance(node.value, tuple):
        return f"the list {describe(node.plain())}"
    return describe(node.value)


def _methods_of(path: Keys) -> tuple[Keys, Keys]:
    """The possible key paths of the merge method of the stage that has an entry: a single stage, or one of several."""
    return ("merge_method",), (*path[:1], "merge_method")


@dataclass(frozen=True, slots=True)
class _Setter:
    """The entry of a recipe that sets a parameter, for error messages.

    Args:
        method: name of the merge method.
        parameter: the parameter that is set.
        model: the model it is set for; None for all models.
        filter: substring of tensor names that limits the setting, or None.
    """

    method: str
    parameter: Parameter
    model: ModelReference | None = None
    filter: str | None = None

    def __str__(self) -> str:
        model = "" if self.model is None else f", model {self.model.text}"
        return f"{self.method}{model}{'' if self.filter is None else f', filter {self.filter!r}'}"


class NodeReader:
    """Reads values and collects warnings and invalid parameters.

    Args:
        origins: the lines and the overrides that the recipe's entries come from.
        strict: whether unknown keys and settings without effect are errors.
        methods: the merge methods by name.

    Attributes:
        warnings: the warnings.
        mistakes: the errors, to be reported together.
        repeated: key paths of entries that hold an anchor for use elsewhere, which are not reported.
        renames: the renamings of models.
    """

    def __init__(self, origins: Origins, strict: bool, methods: Mapping[str, Method]) -> None:
        self.warnings: list[RecipeWarning] = []
        self.mistakes: list[RecipeError] = []
        self.repeated: set[Keys] = set()
        self.methods = methods
        self.renames = Renames(self.error)
        self._origins = origins
        self._strict = strict
        self._named: set[Keys] = set()
        self._failed: set[Keys] = set()
        self._parameter_names = {parameter.name for method in methods.values() for parameter in method.parameters}

    # Errors and warnings

    def error(
        self, message: str, path: Keys, *causes: Keys, advice: str = "", unsupported: bool = False
    ) -> RecipeError:
        """The error for the entry at `path`, which depends on the entries at `causes`, too."""
        return RecipeError.at(self._origins.locate(path, *causes), message, advice=advice, unsupported=unsupported)

    def fail(self, message: str, path: Keys, *causes: Keys, unsupported: bool = False, named: bool = False) -> None:
        """Add the error to `mistakes` (see `error`); if it is `named`, `check_keys` won't report the entry again."""
        if named:
            self._named.add(path)
        self.mistakes.append(self.error(message, path, *causes, unsupported=unsupported))

    def attempt(self, read: Callable[[], T], path: Keys) -> T | None:
        """The result of `read`; None if it raises a RecipeError, which is added to `mistakes`.

        Args:
            read: reads the entry at `path`.
            path: key path of the entry, for `incomplete`.
        """
        try:
            return read()
        except RecipeError as error:
            self.mistakes.append(error)
            self._failed.update(path[:end] for end in range(len(path) + 1))
            return None

    def incomplete(self, path: Keys) -> bool:
        """Whether an entry at `path` or below it could not be read, so what depends on it can't be checked."""
        return path in self._failed

    def warn(self, kind: WarningKind, problem: str, path: Keys) -> None:
        """Add a warning about the entry at `path`, which strict mode reports as a warning, too."""
        self.warnings.append(RecipeWarning.at(self._origins.locate(path), kind, problem))

    def report(
        self,
        kind: WarningKind,
        problem: str,
        path: Keys,
        *causes: Keys,
        advice: str = "",
        suggestion: str | None = None,
    ) -> None:
        """Add a warning about the entry at `path` and its `causes` (see `error`); in strict mode, to `mistakes`."""
        location = self._origins.locate(path, *causes)
        warning = RecipeWarning.at(location, kind, problem, advice=advice, suggestion=suggestion)
        if self._strict:
            self.mistakes.append(warning.as_error())
        else:
            self.warnings.append(warning)

    # Types of values

    def mapping(self, node: Node, path: Keys, what: str) -> Mapping[str, Node]:
        """The entries of a mapping."""
        if not isinstance(node.value, Mapping):
            raise self.error(f"expected {what}, got {describe_node(node)}", path)
        return node.value

    def entries(self, node: Node, path: Keys, what: str) -> Sequence[Node]:
        """The entries of a non-empty list."""
        if not isinstance(node.value, tuple):
            advice = list_advice(node.value, what)
            raise self.error(f"expected a list of {what}, got {describe_node(node)}{advice}", path)
        if not node.value:
            raise self.error(f"expected a list of {what}, got an empty list", path)
        return node.value

    def text(self, node: Node, path: Keys, what: str) -> str:
        """A string."""
        if not isinstance(node.value, str):
            quotes = " (put it in quotes)" if isinstance(node.value, (bool, int, float)) else ""
            raise self.error(f"expected {what}, got {describe_node(node)}{quotes}", path)
        return node.value

    def switch(self, node: Node, path: Keys) -> bool:
        """A boolean."""
        if not isinstance(node.value, bool):
            raise self.error(f"expected true or false, got {describe_node(node)}", path)
        return node.value

    def dtype(self, node: Node, path: Keys, known: Collection[str] = DTYPES) -> DType:
        """A dtype by its name in torch, with or without ``torch.``; errors list the `known` names."""
        name = self.text(node, path, f"one of {', '.join(known)}").removeprefix("torch.")
        if name not in DTYPES:
            raise self.error(f"unknown dtype {describe(name)}; {dtype_advice(name, known)}", path)
        return DTYPES[name]

    def reference(self, node: Node, path: Keys) -> ModelReference:
        """A model, with or without adapters, see `entries.reference_reader`. Warns of one that is there twice."""
        model = read_reference(self, node, path)
        for adapter, count in Counter(model.adapters).items():
            if count > 1:
                message = f"{adapter.text} is listed {count} times: what it changes is added as often"
                self.warn(WarningKind.DUPLICATE_MODEL, message, path)
        return model

    def layer_range(self, node: Node, path: Keys, model: str | None = None) -> tuple[int, int]:
        """The first layer of a model, and the one after the last, of the model with this path."""
        what = "[first layer, layer after the last]"
        children = node.value if isinstance(node.value, tuple) else ()
        if len(children) != 2 or any(isinstance(child.value, (bool, tuple, Mapping)) for child in children):
            raise self.error(f"expected {what}, got {describe_node(node)}", path)
        first, end = (self.whole_number(child, (*path, index)) for index, child in enumerate(children))
        problem, advice = range_problem(first, end, model)
        if problem:
            raise self.error(f"[{first}, {end}] {problem}", path, advice=advice)
        return first, end

    # Entries of mappings

    def optional(self, keys: Mapping[str, Node], path: Keys, key: str, read: Callable[[Node, Keys], T]) -> T | None:
        """The result of `read` for an entry; None if the entry is absent or null, or after an error (see `attempt`)."""
        child = keys.get(key)
        if child is None or child.value is None:
            return None
        path = (*path, key)
        return self.attempt(lambda: read(child, path), path)

    def required(self, keys: Mapping[str, Node], path: Keys, key: str, known: Collection[str]) -> Node:
        """An entry that must be present and not null. Without it, the error names an unknown key that resembles it."""
        child = keys.get(key)
        if child is not None and child.value is not None:
            return child
        close = next((other for other in keys if other not in known and nearest(other, (key,))), None)
        if close is not None:
            self._named.add((*path, close))
            raise self.error(f"unknown key; did you mean `{key}`?", (*path, close))
        if child is not None:
            raise self.error(f"`{key}` is empty (null){MISSING.get(key, '')}", (*path, key))
        raise self.error(f"`{key}` is missing{MISSING.get(key, '')}", path)

    def check_keys(
        self, keys: Mapping[str, Node], path: Keys, known: Collection[str], *, aliases: Collection[str] = ()
    ) -> None:
        """Report every key that is neither known, nor an alias of a known key."""
        for key in keys:
            here = (*path, key)
            if key in known or key in aliases or key in IGNORED or here in self._named or here in self.repeated:
                continue
            if ("model" in known or "merge_method" in known) and names_adapter(key, keys[key]):
                base = keys["model"].value if "model" in keys else None
                self.fail(_ADAPTER_FORM.format(base if isinstance(base, str) else "base"), here)
                continue
            close = nearest(key, known)
            advice = key_advice(key, keys, known, path) or (
                f"did you mean `{close}`?" if close else f"known: {', '.join(known)}"
            )
            if key in self._parameter_names and "parameters" in known:
                advice, close = "write it under `parameters`", key
            self.report(WarningKind.UNKNOWN_KEY, "unknown key", (*path, key), advice=advice, suggestion=close)

    # Parameters

    def settings(
        self, keys: Mapping[str, Node], path: Keys, method: Method, *, model: ModelReference | None = None
    ) -> dict[str, Setting]:
        """The validated ``parameters`` of a mapping: those that the method has and that have an effect there.

        Errors in them are added to `mistakes`, to be reported together.

        Args:
            keys: entries of the mapping.
            path: keys that lead to the mapping.
            method: the merge method, which declares the parameters.
            model: the model that they are set for; None if they are set for all models.
        """
        settings: dict[str, Setting] = {}
        entries = self.optional(keys, path, "parameters", self._parameters)
        if entries is None or method is UNKNOWN_METHOD:
            return settings
        path = (*path, "parameters")
        known = {parameter.name: parameter for parameter in method.parameters}
        for name, value in entries.items():
            parameter = known.get(name)
            try:
                if parameter is None:
                    if name not in IGNORED and (*path, name) not in self.repeated:
                        self._report_unknown_parameter(name, method, (*path, name))
                elif model is not None and not parameter.per_input:
                    message = (
                        "it has no effect on a single model: set it in the `parameters` of the slice or the recipe"
                    )
                    self.report(WarningKind.NO_EFFECT, message, (*path, name), *_methods_of(path))
                else:
                    settings[name] = self._setting(value, (*path, name), _Setter(method.name, parameter, model))
            except RecipeError as error:
                self.mistakes.append(error)
        return settings

    def _roles(self, name: str) -> set[tuple[type, bool]]:
        """The types of a parameter in all methods, and whether it is set per model."""
        all_parameters = (parameter for method in self.methods.values() for parameter in method.parameters)
        return {(each.type, each.per_input) for each in all_parameters if each.name == name}

    def _parameters(self, node: Node, path: Keys) -> Mapping[str, Node]:
        return self.mapping(node, path, "a mapping of parameters by name")

    def _report_unknown_parameter(self, name: str, method: Method, path: Keys) -> None:
        """Report a parameter that the method doesn't have.

        A parameter of another method is more likely meant than one of this method with a similar name but another role.
        """
        own = [parameter.name for parameter in method.parameters]
        close = nearest(name, (*own, *sorted(self._parameter_names.difference(own))))
        similar = nearest(name, own)
        if similar is not None and close is not None and self._roles(close) & self._roles(similar):
            close = similar
        others = [m.name for m in self.methods.values() if any(p.name == close for p in m.parameters)]
        advice = f"its parameters: {', '.join(own)}" if own else "it has none"
        if elsewhere := parameter_advice(name):
            advice, close = elsewhere, None
        elif close in own:
            advice = f"did you mean `{close}`?"
        elif close is not None:
            users = f"`{close}` is a parameter of {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
            advice = f"{advice} ({users})" if close == name else f"{users}; {advice}"
            close = None
        problem = f"{method.name} has no such parameter"
        kind = WarningKind.UNKNOWN_PARAMETER
        self.report(kind, problem, path, *_methods_of(path), advice=advice, suggestion=close)

    def _setting(self, node: Node, path: Keys, setter: _Setter) -> Setting:
        if isinstance(node.value, Mapping):
            return (self._condition(node, path, setter),)
        if not isinstance(node.value, tuple) or not any(isinstance(child.value, Mapping) for child in node.value):
            return self._value(node, path, setter)
        conditions: list[Conditional] = []
        for index, child in enumerate(node.value):
            here = (*path, index)
            if not isinstance(child.value, Mapping):
                message = "conditions ({filter, value}) and plain values can't be mixed: for all other tensors, write "
                raise self.error(f"{message}`{{value: {describe_node(child)}}}` as the last condition", here)
            if conditions and conditions[-1].filter in (None, "", "*") and "model" not in child.value:
                message = "it is never reached: the condition before it matches every tensor"
                self.warn(WarningKind.UNREACHABLE, message, here)
            conditions.append(self._condition(child, here, setter))
        return tuple(conditions)

    def _condition(self, node: Node, path: Keys, setter: _Setter) -> Conditional:
        known = ("filter", "value")
        keys = self.mapping(node, path, "a condition")
        value = self.required(keys, path, "value", known)
        self.check_keys(keys, path, known)
        substring = self.optional(keys, path, "filter", lambda n, p: self.text(n, p, "a substring of tensor names"))
        setter = replace(setter, filter=substring)
        return Conditional(substring, self._value(value, (*path, "value"), setter), (*path, "filter"))

    def _value(self, node: Node, path: Keys, setter: _Setter) -> Scalar | Gradient:
        if not isinstance(node.value, tuple):
            return self._number(node, path, setter)
        if not node.value:
            expected = f"{setter.parameter.name} must be {setter.parameter.expected}"
            raise self.error(f"{setter}: {expected}, got an empty list", path)
        return Gradient(tuple(self._number(child, (*path, i), setter) for i, child in enumerate(node.value)))

    def _number(self, node: Node, path: Keys, setter: _Setter) -> Scalar:
        """One value of a parameter. An invalid one is added to `mistakes`, and False is returned instead."""
        parameter = setter.parameter
        try:
            if node.value is None or isinstance(node.value, (tuple, Mapping)):
                raise ParameterError(f"{parameter.name} must be {parameter.expected}, got {describe_node(node)}")
            return accept(node.value, parameter)
        except ParameterError as error:
            quoted = isinstance(node.value, str) and node.value.lstrip().startswith("[")
            advice = f"; for a list of values, write {node.value} without quotes" if quoted else ""
            self.mistakes.append(self.error(f"{setter}: {error}{advice}", path))
            return False

    def whole_number(self, node: Node, path: Keys) -> int:
        """A value as an int."""
        if node.value is None or isinstance(node.value, (tuple, Mapping)):
            raise self.error(f"expected a whole number, got {describe_node(node)}", path)
        try:
            return int(coerce(node.value, int))
        except ParameterError as error:
            raise self.error(str(error), path) from error
