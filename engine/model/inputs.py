"""The inputs of a stage as planning sees them: models with their layers, slices with their models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ...errors import CheckpointError
from ...io.safetensors.checkpoint import Checkpoint
from ...methods.kernel.contract import Method
from ..recipe.parameters import SliceParameters
from ..recipe.types import ModelReference, Module, Recipe, Slice, Stage, base_index
from .layers import LayerMap, Stack, find_layers
from .quantized import quantized_tensors

OpenModel = Callable[[ModelReference], Checkpoint]


@dataclass(slots=True, eq=False)
class Model:
    """An input model.

    Args:
        number: its place in the recipe.
        reference: what the recipe calls it.
        checkpoint: its headers.
        layers: which of its tensors are in which layer.
        by_layer: for each main stack and layer, the tensors by the rest of their name.
        outside: the tensors in no layer of a main stack, in file order.
        quantized: tensors whose values need others to be understood, with the reason.
    """

    number: int
    reference: ModelReference
    checkpoint: Checkpoint
    layers: LayerMap
    by_layer: dict[tuple[int, int], dict[str, str]] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    quantized: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the recipe calls it."""
        return self.reference.text

    def stack(self, number: int) -> Stack:
        """One of its main stacks. Raises CheckpointError where it has fewer."""
        mains = self.layers.mains
        if number >= len(mains):
            raise CheckpointError(f"{self.name} has {len(mains)} stack(s) of layers, and the recipe needs {number + 1}")
        return mains[number]


def open_models(references: Iterable[ModelReference], open_model: OpenModel) -> tuple[Model, ...]:
    """The models of a recipe, numbered in this order. Raises CheckpointError."""
    models = []
    for number, reference in enumerate(references):
        checkpoint = open_model(reference)
        layers = find_layers(checkpoint.tensors, checkpoint.config)
        model = Model(number, reference, checkpoint, layers)
        stacks = {stack.prefix: index for index, stack in enumerate(layers.mains)}
        for name in checkpoint.tensors:
            layer = layers.split(name)
            if layer is None:
                model.outside.append(name)
            else:
                model.by_layer.setdefault((stacks[layer.stack], layer.index), {})[layer.rest] = name
        model.quantized = quantized_tensors(checkpoint.tensors)
        models.append(model)
    return tuple(models)


class BoundSlice:
    """A slice of the recipe with its models opened.

    Attributes:
        slice: as the recipe has it.
        models: those of its sources, in their order.
        base: which of them is the base model, where the method has a place for one.
        anchor: which of them is the base model, whatever the method does with it.
        parameters: the method's, looked up for each tensor.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        module: Module,
        part: Slice,
        method: Method,
        models: Mapping[ModelReference, Model],
    ) -> None:
        self.slice = part
        self.models = [models[source.model] for source in part.sources]
        self.base = base_index(stage, part, method)
        reference = part.base_model or stage.base_model
        self.base_any_method = next((i for i, source in enumerate(part.sources) if source.model == reference), None)
        self.parameters = SliceParameters(recipe, stage, module, part, method, self.base)
        self._recipe = recipe

    def ranges(self, stack: int) -> list[tuple[int, int]]:
        """The layers [first, end) of a main stack that each source gives.

        Raises:
            RecipeError: where they are not in the model, or not equally many.
        """
        found = []
        for source, model in zip(self.slice.sources, self.models, strict=True):
            count = model.stack(stack).count
            first, end = source.layer_range or (0, count)
            if end > count:
                raise self._recipe.error(
                    (*source.place, "layer_range"),
                    f"[{first}, {end}] ends past the last layer: {model.name} has {count} layers, so that {count} is "
                    "the largest end",
                )
            found.append((first, end))
        if len({end - first for first, end in found}) > 1:
            counts = ", ".join(
                f"{end - first} of {model.name}" for (first, end), model in zip(found, self.models, strict=True)
            )
            raise self._recipe.error(
                self.slice.place, f"the sources of a slice must give equally many layers, and here they give {counts}"
            )
        return found
