"""What comes from where, layer by layer: runs of input layers that become runs of output layers, read off the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...engine.graph.graph import Kind

if TYPE_CHECKING:
    from ...engine.model.inputs import Model
    from ...engine.run.plan import Plan


@dataclass(frozen=True, slots=True)
class InputStack:
    """The layers of one stack of an input model.

    Args:
        model: its number in the recipe.
        name: of the model.
        prefix: of the stack.
        count: how many layers it has, those beyond config.json's count included.
    """

    model: int
    name: str
    prefix: str
    count: int


@dataclass(frozen=True, slots=True)
class LayerRun:
    """Neighbouring layers of an input that become neighbouring layers of the output.

    Args:
        strip: the number of the strip that they are of.
        first: the first of them.
        out: the layer of the output that it becomes, alone or with others.
        count: how many layers.
    """

    strip: int
    first: int
    out: int
    count: int


@dataclass(frozen=True, slots=True)
class StackMap:
    """One stack of the output, and what its layers are made of.

    Args:
        prefix: of the stack.
        layers: how many it has.
        strips: the stacks of the inputs that it takes layers from.
        bands: which layers become which.
    """

    prefix: str
    layers: int
    strips: tuple[InputStack, ...]
    bands: tuple[LayerRun, ...]


@dataclass(frozen=True, slots=True)
class Outside:
    """Output tensors in no layer, of the same input models.

    Args:
        tensors: their names.
        models: the inputs that they are made of.
        nbytes: of them together.
    """

    tensors: tuple[str, ...]
    models: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Curve:
    """A parameter over the layers of the output.

    Args:
        parameter: its name.
        model: whose it is; "" where all inputs share it.
        tensors: the tensors of a layer for which it has these values.
        values: of each layer; None where it has none.
    """

    parameter: str
    model: str
    tensors: tuple[str, ...]
    values: tuple[float | None, ...]


def weaves(plan: Plan) -> tuple[list[StackMap], list[Outside]]:
    """The stacks of the output with their bands, and the tensors outside of them."""
    graph, models = plan.built.graph, plan.built.models
    links: dict[str, set[tuple[int, int, str, int]]] = {}
    outside: dict[tuple[int, ...], list[int]] = {}
    for number in graph.outputs_in(""):
        output = graph.outputs[number]
        place = _layer_of(models[plan.built.donor], output.name)
        sources = graph.node_sources[output.node]
        if place is None:
            outside.setdefault(tuple(dict.fromkeys(graph.read_models[read] for read in sources)), []).append(number)
            continue
        found = links.setdefault(place[0], set())
        for read in sources:
            model = models[graph.read_models[read]]
            source = _layer_of(model, graph.read_names[read])
            if source is not None:
                found.add((place[1], model.number, *source))
    loose = [
        Outside(
            tuple(graph.outputs[number].name for number in numbers),
            tuple(models[model].name for model in owners),
            sum(graph.nbytes(graph.outputs[number].node) for number in numbers),
        )
        for owners, numbers in outside.items()
    ]
    return [_weave(prefix, found, models) for prefix, found in links.items()], loose


def _layer_of(model: Model, name: str) -> tuple[str, int] | None:
    found = model.layers.split(name)
    return None if found is None else (found.stack, found.index)


def _weave(prefix: str, links: set[tuple[int, int, str, int]], models: tuple[Model, ...]) -> StackMap:
    stacks = sorted({(model, stack) for _, model, stack, _ in links})
    strips = []
    for model, stack in stacks:
        known = next((found for found in models[model].layers.mains if found.prefix == stack), None)
        most = max(layer for _, number, name, layer in links if (number, name) == (model, stack)) + 1
        count = max(most, known.count if known is not None else 0)
        strips.append(InputStack(model, models[model].name, stack, count))
    number_of = {stack: number for number, stack in enumerate(stacks)}
    bands = sorted(
        _runs(sorted((number_of[model, stack], layer - out, out) for out, model, stack, layer in links)),
        key=lambda band: (band.out, band.strip, band.first),
    )
    return StackMap(prefix, max(out for out, *_ in links) + 1, tuple(strips), tuple(bands))


def _runs(links: list[tuple[int, int, int]]) -> Iterator[LayerRun]:
    """Bands from (strip, layer of the input minus that of the output, layer of the output), sorted."""
    start = 0
    for place, (strip, shift, out) in enumerate(links):
        following = links[place + 1] if place + 1 < len(links) else None
        if following != (strip, shift, out + 1):
            first = links[start][2]
            yield LayerRun(strip, first + shift, first, out - first + 1)
            start = place + 1


def curves(plan: Plan, most: int = 12) -> list[Curve]:
    """Parameters that aren't the same for all tensors in the layers of the main stack, as they change over them."""
    graph, donor = plan.built.graph, plan.built.models[plan.built.donor]
    values: dict[tuple[str, int], dict[str, dict[int, float]]] = {}
    names: dict[tuple[str, int], str] = {}
    layers = plan.built.layers
    for output in (graph.outputs[number] for number in graph.outputs_in("")):
        operation = graph.operation(output.node)
        layer = donor.layers.split(output.name)
        if operation.kind is not Kind.MERGE or layer is None or layer.stack != donor.layers.main.prefix:
            continue
        sources = graph.node_sources[output.node]
        for parameter, value in operation.parameters:
            each = value if isinstance(value, tuple) else (value,)
            for place, one in enumerate(each):
                if isinstance(value, tuple) and place == operation.base:
                    continue
                if not isinstance(one, (int, float)) or layer.index >= layers:
                    continue
                key = (parameter, place if isinstance(value, tuple) else -1)
                if key[1] >= 0 and place < len(sources):
                    names.setdefault(key, graph.models[graph.read_models[sources[place]]])
                values.setdefault(key, {}).setdefault(layer.rest, {})[layer.index] = float(one)
    found: list[Curve] = []
    for key, by_tensor in values.items():
        alike: dict[tuple[float | None, ...], list[str]] = {}
        for rest, by_layer in by_tensor.items():
            alike.setdefault(tuple(by_layer.get(layer) for layer in range(layers)), []).append(rest)
        if len({value for curve in alike for value in curve if value is not None}) < 2:
            continue
        found += [Curve(key[0], names.get(key, ""), tuple(rests), curve) for curve, rests in alike.items()]
    return found[:most]
