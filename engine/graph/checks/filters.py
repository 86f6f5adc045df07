"""Finds the filters of a recipe that match no tensor name, and the part of a name that was probably meant."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain

from ...model.inputs import Model
from ...model.logical import LogicalTensors
from ...model.warnings import ModelWarning, ModelWarningKind
from ...recipe.misplaced import nearest
from ...recipe.nodes import Keys
from ...recipe.types import Module, Recipe, Stage
from ..graph import MergeGraph
from ..values import renamed

_WILDCARDS = frozenset("*?^$[]|\\")
_MOST_LINES = 5
"""The number of further lines with the same filter that a warning lists."""


def unmatched_filters(
    recipe: Recipe, stage: Stage, modules: Iterable[Module], names: Iterable[str]
) -> Iterator[ModelWarning]:
    """Warn about filters that match no tensor: they are misspelt, or meant for another architecture.

    Args:
        recipe: the recipe, for the location of a filter.
        stage: the stage.
        modules: the modules of the stage.
        names: names of all tensors that filters are matched against.
    """
    filters = _filters(stage, modules)
    distinct = set(names) if filters else set()
    for substring, places in filters.items():
        if not any(substring in name for name in distinct):
            problem = f"filter {substring!r} matches no tensor name: its value is not used{_others(recipe, places[1:])}"
            location = recipe.origins.locate(places[0])
            advice = filter_advice(substring, distinct)
            yield ModelWarning(ModelWarningKind.FILTER, problem, advice, (substring,), location)


def names_of_values(graph: MergeGraph, models: Sequence[Model]) -> Iterator[str]:
    """Yield the names that filters are matched against: those of the tensors that a graph reads, and of its outputs.

    A value that is computed from parts has a name of its own, also where its parts are copied to the output.
    """
    if not any(isinstance(model.tensors, LogicalTensors) for model in models):
        yield from chain(graph.read_names, graph.outputs.names)
        return
    for number, name in zip(graph.read_models, graph.read_names, strict=True):
        yield from _values_of(models[number], name) or (name,)
    for output in graph.outputs:
        read = graph.node_sources[output.node][0]
        copied = graph.operation(output.node).copies_tensor and read >= 0
        part = graph.read_names[read] if copied else output.name
        own = _values_of(models[graph.read_models[read]], part) if copied else []
        yield from [renamed(name, part, output.name) for name in own] or [output.name]


def _values_of(model: Model, part: str) -> list[str]:
    """The names of the values that a stored tensor is a part of; empty if it is one itself."""
    return model.tensors.values_of(part) if isinstance(model.tensors, LogicalTensors) else []


def _filters(stage: Stage, modules: Iterable[Module]) -> dict[str, list[Keys]]:
    """The key paths of each filter of a stage."""
    scopes = [stage.parameters]
    for module in modules:
        scopes.append(module.parameters)
        for part in module.slices or ():
            scopes += [part.parameters, *(source.parameters for source in part.sources)]
    found: dict[str, list[Keys]] = {}
    for scope in scopes:
        for setting in scope.values():
            for condition in setting if isinstance(setting, tuple) else ():
                if condition.filter and condition.filter != "*":
                    found.setdefault(condition.filter, []).append(condition.place)
    for rule in stage.out_dtype.rules if stage.out_dtype is not None else ():
        if rule.filter and rule.filter != "*":
            found.setdefault(rule.filter, []).append(rule.place)
    return {substring: list(dict.fromkeys(places)) for substring, places in found.items()}


def _others(recipe: Recipe, places: Collection[Keys]) -> str:
    """The other places that have the same filter, in parentheses; empty if there are none."""
    lines = [str(line) for place in places if (line := recipe.origins.locate(place).line) is not None]
    lines = list(dict.fromkeys(lines))
    if not places:
        return ""
    if not lines:
        return f" (also in {len(places)} other place{'s' if len(places) > 1 else ''})"
    more = f" and {len(lines) - _MOST_LINES} more" if len(lines) > _MOST_LINES else ""
    return f" (also on line{'s' if len(lines) > 1 else ''} {', '.join(lines[:_MOST_LINES])}{more})"


def filter_advice(substring: str, names: Collection[str]) -> str:
    """What to write instead of a filter that matches no name."""
    similar = _similar(substring, names)
    advice = [f"did you mean `{similar}`?"] if similar else []
    if _WILDCARDS.intersection(substring):
        advice.insert(0, "a filter is a part of tensor names, without wildcards")
    if not similar:
        numbered = (name for name in names if re.search(r"\d", name))
        advice.append(f"names are such as `{min(numbered, default=min(names, default=''))}`")
    return "; ".join(advice)


def _similar(substring: str, names: Collection[str]) -> str | None:
    """The part of existing names that a filter is most likely a misspelling of, or None.

    A part is as many components of a name as the filter has, or a word of a component. Numbers are compared only at
    the end, so a model with many layers has few parts.
    """
    numbers = re.findall(r"\d+", substring)
    inner = re.sub(r"\d+", "#", substring.strip("."))
    count = inner.count(".") + 1
    parts: set[str] = set()
    words: set[str] = set()
    for name in {re.sub(r"\d+", "#", name) for name in names}:
        components = name.split(".")
        parts.update(".".join(components[at : at + count]) for at in range(len(components) - count + 1))
        words.update(word for component in components for word in component.split("_") if len(word) > 1)
    close = nearest(inner, sorted(parts)) or (nearest(inner, sorted(words)) if count == 1 else None)
    if close is None or close.count("#") != len(numbers):
        return None
    for number in numbers:
        close = close.replace("#", number, 1)
    similar = f"{'.' * substring.startswith('.')}{close}{'.' * substring.endswith('.')}"
    return similar if any(similar in name for name in names) else None
