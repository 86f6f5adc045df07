"""Describes parameters: the values of one tensor, and how many tensors use each value of a filter or gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..engine.recipe.parameters import gradient_value
from ..io.units import listed, plural
from ..methods.kernel.composition import Composition, Part
from ..methods.kernel.decoder import Decoder
from .sections import Grid, Section

if TYPE_CHECKING:
    from ..engine.graph.graph import MergeGraph
    from ..engine.recipe.parameter_uses import ParameterUse, Use
    from ..engine.recipe.types import Scalar
    from ..engine.run.plan import Plan

_PARAMETERS = 12
_NAMES = 4


@dataclass(frozen=True, slots=True)
class StageParameters:
    """The parameters of one stage's method for one output tensor.

    Args:
        label: the method, numbered if the tensor goes through several stages: ``0. slerp``.
        method: the method, numbered only if the tensor goes through two stages with the same one.
        stage: name of the stage; None if it has none, or if the recipe has only one stage.
        parameters: value of each parameter after gradients and filters; a tuple has one value for each source.
        sources: names of the models and stages that the sources belong to.
        base: index of the base model in `sources`, or None.
    """

    label: str
    method: str
    stage: str | None
    parameters: dict[str, Any]
    sources: tuple[str, ...]
    base: int | None


def stage_parameters(plan: Plan, node: int) -> tuple[StageParameters, ...]:
    """Return the parameters of a node, for each stage that its sources go through, in order."""
    graph = plan.built.inlined
    operation = graph.operation(node)
    models = [graph.models[graph.read_models[read]] for read in graph.node_sources[node]]
    if not isinstance(operation.kernel, Composition):
        method, own = operation.method, dict(operation.parameters)
        return (StageParameters(method, method, _stage_of(plan, method), own, tuple(models), operation.base),)
    parts = operation.kernel.parts
    methods = [label.partition(". ")[2] for label, _ in operation.parameters]
    names = [_stage_of(plan, method) for method in methods]
    results = [name or label for (label, _), name in zip(operation.parameters, names, strict=True)]
    for number, part in enumerate(parts):
        if _loads_value(part):
            results[number] = _with_adapters(plan, [models[source] for source in part.sources])
    stages = [number for number, part in enumerate(parts) if not _loads_value(part)]
    merging = [methods[number] for number in stages]
    return tuple(
        StageParameters(
            operation.parameters[number][0] if len(stages) > 1 else methods[number],
            methods[number] if merging.count(methods[number]) == 1 else operation.parameters[number][0],
            names[number],
            dict(operation.parameters[number][1]),
            tuple(models[source] if source >= 0 else results[~source] for source in parts[number].sources),
            parts[number].kernel.inputs.base,
        )
        for number in stages
    )


def _with_adapters(plan: Plan, names: Sequence[str]) -> str:
    """Return the name of the model whose value has parts in these models: a model, or the only one with adapters."""
    owners = set(names)
    found = [each.name for each in plan.built.models if owners <= {part.text for part in each.reference.parts}]
    adapted = [name for name in found if name not in owners]
    return names[0] if len(owners) == 1 or len(adapted) != 1 else adapted[0]


def _loads_value(part: Part) -> bool:
    """Return whether a part of a kernel only computes a value of a model from what is stored."""
    stored = all(source >= 0 for source in part.sources)
    return stored and (isinstance(part.kernel.bound[0], Decoder) or bool(part.kernel.inputs.accesses))


def methods_of(graph: MergeGraph, node: int) -> str:
    """Return the methods that a node's values go through, the last one first: ``linear of ties``.

    Args:
        graph: a fused graph, whose intermediate tensors may be nodes of their own.
        node: number of the node.
    """
    methods: dict[str, None] = {}
    nodes = [node]
    for each in nodes:  # grows: after a node come those that it uses
        operation = graph.operation(each)
        composed = isinstance(operation.kernel, Composition)
        own = [name.partition(". ")[2] for name, _ in operation.parameters] if composed else [operation.method]
        methods.update(dict.fromkeys(reversed(own)))
        nodes += [~value for value in graph.node_sources[each] if value < 0 and ~value not in nodes]
    return " of ".join(methods)


def _stage_of(plan: Plan, method: str) -> str | None:
    """Return the name of the only stage with a method; None if several have it, or if the recipe has one stage."""
    if len(plan.recipe.stages) == 1:
        return None
    names = [stage.name for stage in plan.recipe.stages if stage.merge_method == method]
    return names[0] if len(names) == 1 else None


def values_section(values: StageParameters, *, several: bool) -> Section:
    """Return the parameters of a tensor: those that all sources share, and a table of the others.

    Args:
        values: parameters of one stage.
        several: whether the tensor goes through several stages, so the title names this one.
    """
    shared = {name: value for name, value in values.parameters.items() if not isinstance(value, tuple)}
    per_source = {name: value for name, value in values.parameters.items() if isinstance(value, tuple)}
    grid = None
    if per_source:
        rows = tuple(
            (model, *("base" if index == values.base else format_value(value[index]) for value in per_source.values()))
            for index, model in enumerate(values.sources)
            if all(index < len(value) for value in per_source.values())
        )
        grid = Grid(("model", *per_source), rows, frozenset(per_source))
    of = f" of {values.method}" + (f", stage {values.stage}" if values.stage else "")
    title = f"Parameters{of if several else ''}"
    return Section(title, [(name, format_value(value)) for name, value in shared.items()], grid)


def parameters_section(plan: Plan) -> Section | None:
    """List the parameters with filters or gradients, and how many tensors use each value; None if there are none."""
    found = plan.built.parameters
    if not found:
        return None
    fields = []
    for parameter in found[:_PARAMETERS]:
        label = parameter.parameter + (f" of {parameter.model}" if parameter.model is not None else "")
        label += f" in {parameter.stage}" if parameter.stage is not None else ""
        fields += [(label, _text(parameter)), *_outside_layers(plan, parameter, label)]
    lines = []
    if len(found) > _PARAMETERS:
        lines = [f"and {len(found) - _PARAMETERS} more; `mergeloom plan --explain TENSOR` shows the values of a tensor"]
    return Section("Filters and gradients", fields, lines=lines)


def _text(parameter: ParameterUse) -> str:
    filtered = any(use.filter is not None for use in parameter.uses)
    return "; ".join(_use(use, filtered=filtered) for use in parameter.uses)


def _use(use: Use, *, filtered: bool) -> str:
    """Format a value and its tensors: ``'mlp' (21 tensors): 0.5``."""
    who = repr(use.filter) if use.filter is not None else ("the rest" if filtered else "all")
    default = " (default)" if use.default else ""
    return f"{who} ({plural(use.tensors, 'tensor')}): {_value(use.values)}{default}"


def _value(values: tuple[Scalar, ...]) -> str:
    """Format a value, or the first, middle and last value of a gradient."""
    if len(values) == 1:
        return format_value(values[0])
    first, middle, last = (format_value(gradient_value(values, t)) for t in (0.0, 0.5, 1.0))  # type: ignore[arg-type]
    return f"{first} in the first layer of a slice, {middle} in the middle, {last} in the last"


def _outside_layers(plan: Plan, parameter: ParameterUse, label: str) -> list[tuple[str, str]]:
    """Name the tensors outside the layers that use a gradient's first value."""
    split = plan.built.models[plan.built.donor].layers.split
    fields = []
    for use in parameter.uses:
        names = [name for name in use.at_start if split(name) is None]
        if names:
            text = f"{format_value(use.values[0])}, the gradient's first value: {listed(names, _NAMES)}"
            fields.append((f"{label} outside layers", text))
    return fields


def format_value(value: object) -> str:
    """Format a parameter's value as in a recipe."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
