"""Checks the layers of the output against those of the donor, whose config.json describes them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ....io.units import listed, ranges
from ...model.checks.mismatch import TensorMismatch
from ...model.checks.shapes import shape_mismatch
from ...model.completeness import DAMAGED, incomplete_outside
from ...model.inputs import BoundSlice, Model
from ...model.layer_kinds import LayerKind, LayerKinds
from ...model.logical import shape_of
from ...model.modules import absent_part
from ...model.roles import is_buffer
from ...model.warnings import ModelWarning, ModelWarningKind


@dataclass(frozen=True, slots=True, eq=False)
class OutputLayer:
    """A layer of the output.

    Args:
        target: number of the layer in the output.
        model: name of the model that it comes from.
        index: number of the layer in that model.
        t: position of the layer in a gradient.
        rests: the tensors of the layer, by the part of their names after its number.
    """

    target: int
    model: str
    index: int
    t: float
    rests: Collection[str]


class LayerChecks:
    """Checks the layers of one stage.

    Args:
        donor: the model whose config.json describes the output.
    """

    def __init__(self, donor: Model) -> None:
        self._donor = donor
        self._shapes: dict[int, set[frozenset[tuple[str, tuple[int, ...]]]]] = {}
        self._kinds: dict[tuple[int, int], LayerKinds] = {}
        self._layers: dict[int, list[OutputLayer]] = {}
        self._used: dict[tuple[int, int], tuple[Model, set[int]]] = {}
        self._gradients: dict[str, list[str]] = {}

    def require_known(self, model: Model, stack: int, index: int) -> None:
        """Check that a layer from another model than the donor has the same tensors as one of the donor's.

        Raises:
            CheckpointError: if a tensor is missing, unexpected or has another shape.
        """
        if stack not in self._shapes:
            layers = range(self._donor.stack(stack).count)
            self._shapes[stack] = {frozenset(_shapes(self._donor, stack, layer).items()) for layer in layers}
        shapes = _shapes(model, stack, index)
        if frozenset(shapes.items()) in self._shapes[stack]:
            return
        layer = min(index, self._donor.stack(stack).count - 1)
        known = _shapes(self._donor, stack, layer)
        for rest in (*known, *shapes):
            if rest not in shapes:
                name = self._donor.by_layer[stack, layer][rest]
                raise missing_tensor(name, self._donor, model)
            if rest not in known:
                raise missing_tensor(model.by_layer[stack, index][rest], model, self._donor)
            if shapes[rest] != known[rest]:
                name = model.by_layer[stack, index][rest]
                message = shape_mismatch(name, self._donor, known[rest], model, shapes[rest])
                raise TensorMismatch(message, self._donor, model)

    def add(self, part: BoundSlice, stack: int, indices: Sequence[int], layer: OutputLayer) -> None:
        """Record a layer of the output.

        Args:
            part: the slice that it belongs to.
            stack: number of the main stack.
            indices: the layer of each source that it is made of.
            layer: the layer.
        """
        self._layers.setdefault(stack, []).append(layer)
        for model, index in zip(part.models, indices, strict=True):
            self._used.setdefault((model.number, stack), (model, set()))[1].add(index)
        kind = self._kinds_of(self._donor, stack).of(frozenset(layer.rests))
        if kind is not None:
            self._record_gradients(part, stack, indices, layer, kind)

    def warnings(self) -> Iterator[ModelWarning]:
        """The warnings about all recorded layers."""
        for (_, stack), (model, used) in self._used.items():
            if model.checkpoint.files:  # not a stage, whose models are checked themselves
                yield from self._incomplete(model, stack, used)
                if model is self._donor:
                    yield from incomplete_outside(model, stack)
        for stack, layers in self._layers.items():
            unmoved = list(range(self._donor.stack(stack).count))
            if [layer.target for layer in layers] != unmoved or [layer.index for layer in layers] != unmoved:
                yield from self._moved(stack, layers)
                yield from self._side_lists(stack)
        for problem, names in self._gradients.items():
            yield ModelWarning(
                ModelWarningKind.LAYER_TENSORS,
                f"{listed(names)}: {problem}",
                "set the value for this tensor with a filter",
                tuple(names),
            )

    def _kinds_of(self, model: Model, stack: int) -> LayerKinds:
        key = (model.number, stack)
        if key not in self._kinds:
            self._kinds[key] = LayerKinds(model, stack)
        return self._kinds[key]

    def _incomplete(self, model: Model, stack: int, used: Collection[int]) -> Iterator[ModelWarning]:
        """Warn about tensors that layers of an input lack, although all other layers of their kind have them."""
        lacking: dict[tuple[int, ...], list[str]] = {}
        for kind in self._kinds_of(model, stack).kinds:
            for layers, rest in kind.incomplete():
                if any(layer in used for layer in layers):
                    lacking.setdefault(layers, []).append(rest)
        prefix = model.stack(stack).prefix
        for layers, rests in lacking.items():
            one = len(layers) == 1
            yield ModelWarning(
                ModelWarningKind.LAYER_TENSORS,
                f"{model.name}: layer{'' if one else 's'} {ranges(layers)} of {prefix} {'lacks' if one else 'lack'} "
                f"{listed(rests)}, which all {'similar' if one else 'other similar'} layers have",
                DAMAGED,
                tuple(f"{prefix}.{layer}.{rest}" for layer in layers for rest in rests),
            )

    def _moved(self, stack: int, layers: Sequence[OutputLayer]) -> Iterator[ModelWarning]:
        """Warn about layers with other tensors than the donor has in their positions, counted by kind of layer."""
        kinds = self._kinds_of(self._donor, stack)
        ordinals: dict[int, int] = {}
        found: dict[tuple[bool, frozenset[int]], dict[OutputLayer, list[str]]] = {}
        for layer in layers:
            rests = frozenset(layer.rests)
            kind = kinds.of(rests)
            if kind is None:
                continue
            ordinal = ordinals.get(id(kind), 0)
            ordinals[id(kind)] = ordinal + 1
            for rest, stored in kind.stored.items():
                expected = kind.expected(rest, ordinal)
                if expected is not None and expected is not (rest in rests):
                    found.setdefault((expected, stored), {}).setdefault(layer, []).append(rest)
        for (missing, stored), by_layer in found.items():
            yield self._misplaced(stack, missing, stored, by_layer)

    def _side_lists(self, stack: int) -> Iterator[ModelWarning]:
        """Warn about lists outside the layers with an entry per layer: they are not sliced with the layers."""
        prefix = self._donor.stack(stack).prefix
        for found in self._donor.layers.side_lists(self._donor.stack(stack)):
            yield ModelWarning(
                ModelWarningKind.LAYER_TENSORS,
                f"{found.prefix} has {found.count} entries, probably one per layer of {prefix}: it is not sliced like "
                "the layers, so layers that have moved use the entries of other layers, or none",
                names=(found.prefix,),
            )

    def _misplaced(
        self, stack: int, missing: bool, stored: Collection[int], by_layer: Mapping[OutputLayer, Sequence[str]]
    ) -> ModelWarning:
        """The warning about tensors that layers of the output lack, or that they have although the donor has none."""
        prefix, donor = self._donor.layers.mains[stack].prefix, self._donor
        rests = list(dict.fromkeys(rest for rests in by_layer.values() for rest in rests))
        which = ", ".join(f"{layer.target} (layer {layer.index} of {layer.model})" for layer in list(by_layer)[:3])
        more = f" and {len(by_layer) - 3} more" if len(by_layer) > 3 else ""
        one = len(by_layer) == 1
        verb = ("lacks" if one else "lack") if missing else ("has" if one else "have")
        where = f"stores in layer{'' if len(stored) == 1 else 's'} {ranges(stored)} of {donor.stack(stack).count}"
        if missing:
            effect = "loaders initialize it at random"
            advice = f"keep layers with {rests[0]} where {donor.name} has them"
        else:
            effect = "loaders ignore it there, or use it for other layers"
            advice = f"use layers without {rests[0]} there"
        output = f"the output's {prefix}" if len(donor.layers.mains) > 1 else "the output"
        problem = (
            f"layer{'' if one else 's'} {which}{more} of {output} {verb} {listed(rests)}, which {donor.name} {where}"
        )
        names = tuple(f"{prefix}.{layer.target}.{rest}" for layer, own in by_layer.items() for rest in own)
        return ModelWarning(ModelWarningKind.LAYER_TENSORS, f"{problem}: {effect}", advice, names)

    def _record_gradients(
        self, part: BoundSlice, stack: int, indices: Sequence[int], layer: OutputLayer, kind: LayerKind
    ) -> None:
        """Record the tensors of a layer that other layers probably share, and whose parameters have a gradient."""
        prefix, count = self._donor.layers.mains[stack].prefix, self._donor.stack(stack).count
        for rest, stored in kind.shared().items():
            if rest not in layer.rests:
                continue
            sources = [
                model.by_layer[stack, index].get(rest) for model, index in zip(part.models, indices, strict=True)
            ]
            name = f"{prefix}.{layer.target}.{rest}"
            inputs = [(number, source) for number, source in enumerate(sources) if source is not None]
            if len(inputs) < len(sources):
                continue  # it is copied from one of the sources, or a method's rule decides
            for parameter, values in part.parameters.gradients(name, inputs, layer.t).items():
                only = f"layer {ranges(stored)} of {count} stores"
                if len(stored) > 1:
                    only = f"layers {ranges(stored)} of {count} store"
                problem = (
                    f"only {only} it, so others probably share it, and the gradient of `{parameter}` has one value for "
                    f"all of them: {values}"
                )
                self._gradients.setdefault(problem, []).append(name)


def _shapes(model: Model, stack: int, index: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's parameters, by the part of the name after the layer's number."""
    tensors = model.tensors
    layer = model.by_layer.get((stack, index), {})
    shapes = {rest: shape_of(tensors, name) for rest, name in layer.items()}
    return {rest: shape for rest, shape in shapes.items() if not is_buffer(layer[rest], shape)}


def missing_tensor(name: str, first: Model, second: Model) -> TensorMismatch:
    """The error for a tensor that a slice's model has, and another slice's model lacks."""
    message = (
        f"tensor {name} is in {first.name} but not in {second.name}: slices of different models can be combined only "
        f"if their tensors have the same names and shapes{absent_part(first, second, name)}"
    )
    return TensorMismatch(message, first, second)
