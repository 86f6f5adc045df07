"""Reading the single values of a recipe's nodes: each of the wrong kind is an error that says what and where."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ...errors import RecipeError
from ...io.safetensors.dtypes import BF16, F16, F32, F64, DType
from ...methods.kernel.contract import Method, Parameter
from .parameters import ParameterError, accept, coerce, describe
from .types import Conditional, Gradient, ModelReference, Scalar, Setting, line_of
from .yaml import Keys, Node

T = TypeVar("T")

DTYPES = {"bfloat16": BF16, "float16": F16, "float32": F32, "float64": F64}
DTYPE_NICKNAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}

IGNORED = frozenset(("int8_mask", "residual_weight"))
"""Keys and parameters that mergekit takes, and that have no effect on a result: they are passed over without a word."""

HINTS = {
    "layer_range": "`models` takes whole models: use `slices` for ranges of layers",
    "pattern": "did you mean `filter`?",
    "out_path": "give the stage a `name`, by which the others refer to it",
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is most likely a misspelling of."""
    folded = {other.lower(): other for other in known}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), list(folded), n=1, cutoff=0.65)
    return folded[found[0]] if found else None


def found(node: Node) -> str:
    """What a node is, for an error message."""
    if isinstance(node.value, Mapping):
        return "a mapping"
    if isinstance(node.value, tuple):
        return f"the list {describe(node.plain())}"
    return describe(node.value)


@dataclass(frozen=True, slots=True)
class _Setter:
    """The part of a recipe that sets a parameter, for error messages.

    Args:
        method: name of the merge method.
        parameter: the parameter that is set.
        model: the model for which it is set; None for all of them.
        filter: the part of tensor names that the setting is limited to, or None.
    """

    method: str
    parameter: Parameter
    model: ModelReference | None = None
    filter: str | None = None

    def __str__(self) -> str:
        model = "" if self.model is None else f", model {self.model.text}"
        return f"{self.method}{model}{'' if self.filter is None else f', filter {self.filter!r}'}"


class NodeReader:
    """Reads values, and collects the warnings and the mistakes in parameters.

    Args:
        file: the recipe's, or None.
        lines: of everything in it.
        strict: whether what is unknown or without effect is an error.
        methods: the merge methods by name.
    """

    def __init__(
        self, file: Path | None, lines: Mapping[Keys, int], strict: bool, methods: Mapping[str, Method]
    ) -> None:
        self.warnings: list[str] = []
        self.mistakes: list[RecipeError] = []
        self.methods = methods
        self._file = file
        self._lines = lines
        self._strict = strict
        self._parameter_names = {parameter.name for method in methods.values() for parameter in method.parameters}

    # What is wrong

    def error(self, message: str, path: Keys) -> RecipeError:
        """The error for what stands at `path`."""
        return RecipeError(message, source=self._file, line=line_of(self._lines, path), path=path)

    def warn(self, message: str, path: Keys) -> None:
        """Note something odd that is no error."""
        self.warnings.append(str(self.error(message, path)))

    def object_to(self, message: str, path: Keys) -> None:
        """A warning, or an error where the user asked to be strict."""
        if self._strict:
            raise self.error(message.replace(", ignored;", ";"), path)
        self.warn(message, path)

    # Kinds of values

    def mapping(self, node: Node, path: Keys, what: str) -> Mapping[str, Node]:
        """The entries of a mapping."""
        if not isinstance(node.value, Mapping):
            raise self.error(f"expected {what}, and found {found(node)}", path)
        return node.value

    def entries(self, node: Node, path: Keys, what: str) -> Sequence[Node]:
        """The entries of a list that is not empty."""
        if not isinstance(node.value, tuple):
            raise self.error(f"expected a list of {what}, and found {found(node)}", path)
        if not node.value:
            raise self.error(f"expected a list of {what}, and it is empty", path)
        return node.value

    def text(self, node: Node, path: Keys, what: str) -> str:
        """A text."""
        if not isinstance(node.value, str):
            quotes = " (put it in quotes)" if isinstance(node.value, (int, float)) else ""
            raise self.error(f"expected {what}, and found {found(node)}{quotes}", path)
        return node.value

    def switch(self, node: Node, path: Keys) -> bool:
        """A boolean."""
        if not isinstance(node.value, bool):
            raise self.error(f"expected true or false, and found {found(node)}", path)
        return node.value

    def dtype(self, node: Node, path: Keys) -> DType:
        """A dtype by torch's name, with or without ``torch.``."""
        name = self.text(node, path, f"one of {', '.join(DTYPES)}").removeprefix("torch.")
        if name not in DTYPES:
            close = DTYPE_NICKNAMES.get(name.lower()) or nearest(name, DTYPES)
            advice = f"did you mean `{close}`?" if close else f"use one of {', '.join(DTYPES)}"
            raise self.error(f"unknown dtype {describe(name)}; {advice}", path)
        return DTYPES[name]

    def reference(self, node: Node, path: Keys) -> ModelReference:
        """A model: ``path``, ``id@revision``, ``{path, revision}``, or mergekit's ``{model: {path, revision}}``."""
        if not isinstance(node.value, Mapping):
            text = self.text(node, path, "a model: a directory or an id of the Hub")
            try:
                return ModelReference.parse(text)
            except ValueError as error:
                raise self.error(str(error), path) from error
        keys = node.value
        if "lora" in keys and keys["lora"].value is not None:
            message = "LoRA adapters can't be merged yet: apply the adapter first, and name the result"
            raise self.error(message, (*path, "lora"))
        if "model" in keys:
            self.known(keys, path, ("model", "lora", "override_architecture"))
            return self.reference(keys["model"], (*path, "model"))
        if "path" not in keys:
            raise self.error("expected a model, and found a mapping without `path`", path)
        self.known(keys, path, ("path", "revision", "lora"))
        name = self.text(keys["path"], (*path, "path"), "a directory or an id of the Hub")
        revision = self.optional(keys, path, "revision", lambda n, p: self.text(n, p, "a branch, tag or commit"))
        if not name.strip() or (revision is not None and not revision.strip()):
            raise self.error("`path` and `revision` can't be empty", path)
        return ModelReference(name, revision)

    def layer_range(self, node: Node, path: Keys) -> tuple[int, int]:
        """The first layer and the one after the last."""
        what = "[first layer, layer after the last]"
        children = node.value if isinstance(node.value, tuple) else ()
        if len(children) != 2 or any(isinstance(child.value, (bool, tuple, Mapping)) for child in children):
            raise self.error(f"expected {what}, and found {found(node)}", path)
        first, end = (self.whole_number(child, (*path, index)) for index, child in enumerate(children))
        if first < 0:
            raise self.error(f"[{first}, {end}] begins before layer 0: layers count from 0", path)
        if end <= first:
            why = "is empty: the second number is the layer after the last" if end == first else "runs backwards"
            raise self.error(f"[{first}, {end}] {why}", path)
        return first, end

    # Entries of mappings

    def optional(self, keys: Mapping[str, Node], path: Keys, key: str, read: Callable[[Node, Keys], T]) -> T | None:
        """What `read` makes of an entry; None where it is absent or null."""
        child = keys.get(key)
        return None if child is None or child.value is None else read(child, (*path, key))

    def required(self, keys: Mapping[str, Node], path: Keys, key: str, known: Collection[str]) -> Node:
        """An entry that must be there and not null; among the unknown keys its misspelling is looked for."""
        child = keys.get(key)
        if child is not None and child.value is not None:
            return child
        close = next((other for other in keys if other not in known and nearest(other, (key,))), None)
        if close is not None:
            raise self.error(f"unknown key; did you mean `{key}`?", (*path, close))
        raise self.error(f"`{key}` is missing", path)

    def known(self, keys: Mapping[str, Node], path: Keys, known: Collection[str]) -> None:
        """Object to every key that isn't among the known ones."""
        for key in keys:
            if key in known or key in IGNORED:
                continue
            close = nearest(key, known)
            advice = HINTS.get(key) or (f"did you mean `{close}`?" if close else f"known: {', '.join(known)}")
            if key in self._parameter_names and "parameters" in known:
                advice = "write it under `parameters`"
            self.object_to(f"unknown key, ignored; {advice}", (*path, key))

    # Parameters

    def settings(
        self, keys: Mapping[str, Node], path: Keys, method: Method, *, model: ModelReference | None = None
    ) -> dict[str, Setting]:
        """The ``parameters`` of a mapping, those that the method has and that have an effect there, validated.

        Mistakes in them go to `mistakes`, to be reported together.

        Args:
            keys: the mapping.
            path: its place.
            method: declares the parameters.
            model: the model that they are set for; None where they are set for all.
        """
        settings: dict[str, Setting] = {}
        child = keys.get("parameters")
        if child is None or child.value is None:
            return settings
        path = (*path, "parameters")
        known = {parameter.name: parameter for parameter in method.parameters}
        for name, value in self.mapping(child, path, "a mapping of parameters by name").items():
            parameter = known.get(name)
            try:
                if parameter is None:
                    if name not in IGNORED:
                        self.object_to(self._unknown_parameter(name, method), (*path, name))
                elif model is not None and not parameter.per_input:
                    message = (
                        "it has no effect on a single model: set it in the `parameters` of the slice or the recipe"
                    )
                    self.object_to(message, (*path, name))
                else:
                    settings[name] = self._setting(value, (*path, name), _Setter(method.name, parameter, model))
            except RecipeError as error:
                self.mistakes.append(error)
        return settings

    def _unknown_parameter(self, name: str, method: Method) -> str:
        own = [parameter.name for parameter in method.parameters]
        close = nearest(name, own)
        if close:
            return f"{method.name} has no such parameter, ignored; did you mean `{close}`?"
        others = [m.name for m in self.methods.values() if any(p.name == name for p in m.parameters)]
        advice = f"it has {', '.join(own)}" if own else "it has none"
        if others:
            advice += f" (`{name}` is one of {', '.join(others[:3])}{', ...' if len(others) > 3 else ''})"
        return f"{method.name} has no such parameter, ignored; {advice}"

    def _setting(self, node: Node, path: Keys, setter: _Setter) -> Setting:
        if isinstance(node.value, Mapping):
            return (self._condition(node, path, setter),)
        if not isinstance(node.value, tuple) or not any(isinstance(child.value, Mapping) for child in node.value):
            return self._value(node, path, setter)
        conditions: list[Conditional] = []
        for index, child in enumerate(node.value):
            here = (*path, index)
            if not isinstance(child.value, Mapping):
                message = f"conditions ({{filter, value}}) and plain values can't be mixed: found {found(child)}"
                raise self.error(message, here)
            if conditions and conditions[-1].filter in (None, "", "*"):
                self.warn("it is never reached: the condition before it fits every tensor", here)
            conditions.append(self._condition(child, here, setter))
        return tuple(conditions)

    def _condition(self, node: Node, path: Keys, setter: _Setter) -> Conditional:
        known = ("filter", "value")
        keys = self.mapping(node, path, "a condition")
        value = self.required(keys, path, "value", known)
        self.known(keys, path, known)
        part = self.optional(keys, path, "filter", lambda n, p: self.text(n, p, "a part of tensor names"))
        return Conditional(part, self._value(value, (*path, "value"), replace(setter, filter=part)))

    def _value(self, node: Node, path: Keys, setter: _Setter) -> Scalar | Gradient:
        if not isinstance(node.value, tuple):
            return self._number(node, path, setter)
        if not node.value:
            expected = f"{setter.parameter.name} must be {setter.parameter.expected}"
            raise self.error(f"{setter}: {expected}, got an empty list", path)
        return Gradient(tuple(self._number(child, (*path, i), setter) for i, child in enumerate(node.value)))

    def _number(self, node: Node, path: Keys, setter: _Setter) -> Scalar:
        """One value of a parameter; a mistake is noted, and False returned in its place."""
        parameter = setter.parameter
        try:
            if node.value is None or isinstance(node.value, (tuple, Mapping)):
                raise ParameterError(f"{parameter.name} must be {parameter.expected}, got {found(node)}")
            return accept(node.value, parameter)
        except ParameterError as error:
            self.mistakes.append(self.error(f"{setter}: {error}", path))
            return False

    def whole_number(self, node: Node, path: Keys) -> int:
        """One value as an int."""
        if node.value is None or isinstance(node.value, (tuple, Mapping)):
            raise self.error(f"expected a value, and found {found(node)}", path)
        try:
            return int(coerce(node.value, int))
        except ParameterError as error:
            raise self.error(str(error), path) from error
