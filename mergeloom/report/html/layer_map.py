"""The layer map: which layers of the inputs become which layers of the output, read from the graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...engine.graph.graph import Kind
from ..parameters import StageParameters, stage_parameters

if TYPE_CHECKING:
    from ...engine.model.inputs import Model
    from ...engine.run.plan import Plan


@dataclass(frozen=True, slots=True)
class InputStack:
    """The layers of one stack of an input model.

    Args:
        model: number of the model in the recipe.
        name: name of the model.
        prefix: common prefix of the layers' tensor names.
        count: number of layers, including those beyond config.json's count.
    """

    model: int
    name: str
    prefix: str
    count: int


@dataclass(frozen=True, slots=True)
class LayerRun:
    """Consecutive layers of an input that become consecutive layers of the output.

    Args:
        input: index of the input stack in the map's inputs.
        first: first layer of the input.
        out: layer of the output that the first layer becomes, alone or merged with others.
        count: number of layers.
    """

    input: int
    first: int
    out: int
    count: int


@dataclass(frozen=True, slots=True)
class StackMap:
    """One stack of the output, with the sources of its layers.

    Args:
        prefix: common prefix of the layers' tensor names.
        layers: number of layers.
        inputs: stacks of the inputs that contribute layers.
        runs: runs of input layers, with the output layers that they become.
    """

    prefix: str
    layers: int
    inputs: tuple[InputStack, ...]
    runs: tuple[LayerRun, ...]


@dataclass(frozen=True, slots=True)
class NonLayerTensors:
    """Output tensors outside the layers that come from the same input models.

    Args:
        tensors: names of the tensors.
        models: names of the input models.
        nbytes: total size of the tensors in bytes.
    """

    tensors: tuple[str, ...]
    models: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Curve:
    """The values of a parameter by output layer.

    Args:
        parameter: name of the parameter.
        model: name of the model that the values belong to; "" if all inputs share them.
        tensors: names within a layer of the tensors that have these values.
        values: value at each layer; None where the layer has none.
    """

    parameter: str
    model: str
    tensors: tuple[str, ...]
    values: tuple[float | None, ...]


def stack_maps(plan: Plan) -> tuple[list[StackMap], list[NonLayerTensors]]:
    """Return the map of each stack of the output, and the tensors outside the layers."""
    graph, models = plan.built.graph, plan.built.models
    links: dict[str, set[tuple[int, int, str, int]]] = {}
    others: dict[tuple[int, ...], list[int]] = {}
    for number in graph.outputs_in(""):
        output = graph.outputs[number]
        layer = _layer_of(models[plan.built.donor], output.name)
        sources = graph.reads_of(output.node)
        if layer is None:
            others.setdefault(tuple(dict.fromkeys(graph.read_models[read] for read in sources)), []).append(number)
            continue
        stack_links = links.setdefault(layer[0], set())
        for read in sources:
            model = models[graph.read_models[read]]
            source = _layer_of(model, graph.read_names[read])
            if source is not None:
                stack_links.add((layer[1], model.number, *source))
    non_layer_tensors = [
        NonLayerTensors(
            tuple(graph.outputs[number].name for number in numbers),
            tuple(models[model].name for model in owners),
            sum(graph.nbytes(graph.outputs[number].node) for number in numbers),
        )
        for owners, numbers in others.items()
    ]
    return [_stack_map(prefix, stack_links, models) for prefix, stack_links in links.items()], non_layer_tensors


def _layer_of(model: Model, name: str) -> tuple[str, int] | None:
    """Return the stack and the index of the layer that a tensor belongs to; None outside the layers."""
    layer = model.layers.split(name)
    return None if layer is None else (layer.stack, layer.index)


def _stack_map(prefix: str, links: set[tuple[int, int, str, int]], models: tuple[Model, ...]) -> StackMap:
    """Map one stack.

    Args:
        prefix: common prefix of the layers' tensor names.
        links: (layer of the output, model, stack of the model, layer of the model) for each pair that are connected.
        models: input models.
    """
    stacks = sorted({(model, stack) for _, model, stack, _ in links})
    inputs = []
    for model, stack in stacks:
        known = next((other for other in models[model].layers.mains if other.prefix == stack), None)
        used = max(layer for _, number, name, layer in links if (number, name) == (model, stack)) + 1
        count = max(used, known.count if known is not None else 0)
        inputs.append(InputStack(model, models[model].name, stack, count))
    number_of = {stack: number for number, stack in enumerate(stacks)}
    runs = sorted(
        _runs(sorted((number_of[model, stack], layer - out, out) for out, model, stack, layer in links)),
        key=lambda run: (run.out, run.input, run.first),
    )
    return StackMap(prefix, max(out for out, *_ in links) + 1, tuple(inputs), tuple(runs))


def _runs(links: list[tuple[int, int, int]]) -> Iterator[LayerRun]:
    """Join links into runs.

    Args:
        links: (input stack, input layer minus output layer, output layer), sorted.
    """
    start = 0
    for index, (stack, shift, out) in enumerate(links):
        following = links[index + 1] if index + 1 < len(links) else None
        if following != (stack, shift, out + 1):
            first = links[start][2]
            yield LayerRun(stack, first + shift, first, out - first + 1)
            start = index + 1


_Key = tuple[str, int]
"""A parameter, with its stage if there are several, and the source of its values; -1 if all sources share them."""


def curves(plan: Plan, limit: int = 12) -> list[Curve]:
    """Return up to `limit` curves: the parameters of the main stack that vary between tensors or layers."""
    values, names = _layer_values(plan)
    layers = plan.built.layers
    found: list[Curve] = []
    for key, by_tensor in values.items():
        same_values: dict[tuple[float | None, ...], list[str]] = {}
        for rest, by_layer in by_tensor.items():
            same_values.setdefault(tuple(by_layer.get(layer) for layer in range(layers)), []).append(rest)
        if len({value for curve in same_values for value in curve if value is not None}) < 2:
            continue
        found += [Curve(key[0], names.get(key, ""), tuple(rests), curve) for curve, rests in same_values.items()]
    return found[:limit]


def _layer_values(plan: Plan) -> tuple[dict[_Key, dict[str, dict[int, float]]], dict[_Key, str]]:
    """Collect the numeric parameters of the main stack, by tensor within a layer and by layer, and their models."""
    graph, donor = plan.built.graph, plan.built.models[plan.built.donor]
    values: dict[_Key, dict[str, dict[int, float]]] = {}
    names: dict[_Key, str] = {}
    for output in (graph.outputs[number] for number in graph.outputs_in("")):
        operation = graph.operation(output.node)
        layer = donor.layers.split(output.name)
        if operation.kind is not Kind.MERGE or layer is None or layer.stack != donor.layers.main.prefix:
            continue
        if layer.index >= plan.built.layers:
            continue
        for parameter, place, model, value in _numbers(
            stage_parameters(plan, output.node), several=len(plan.recipe.stages) > 1
        ):
            key = (parameter, place)
            names.setdefault(key, model)
            values.setdefault(key, {}).setdefault(layer.rest, {})[layer.index] = value
    return values, names


def _numbers(stages: Sequence[StageParameters], *, several: bool) -> Iterator[tuple[str, int, str, float]]:
    """Yield the numeric parameters of a tensor: parameter and stage, source (-1 if shared), model or "", value."""
    for stage in stages:
        within = f" in {stage.stage or stage.method}" if several else ""
        for parameter, value in stage.parameters.items():
            for place, one in enumerate(value) if isinstance(value, tuple) else ((-1, value),):
                if (place < 0 or place != stage.base) and isinstance(one, (int, float)):
                    model = stage.sources[place] if 0 <= place < len(stage.sources) else ""
                    yield f"{parameter}{within}", place, model, float(one)
