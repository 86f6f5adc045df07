"""Assigns parts of a model to the modules of a recipe: stacks of layers, and tensors outside of them."""

from __future__ import annotations

import re

from ..recipe.types import Module, Recipe, Stage, modules_of
from .contents.diffusion import part_of
from .inputs import Model
from .roles import is_side_module

SHARED = "shared"
"""mergekit's name for the tensors that encoder and decoder share: T5's ``shared.weight`` and its head."""
PROJECTOR = "multi_modal_projector"
"""mergekit's name for the projector between vision encoder and text model, whatever its name in the model."""
_PROJECTOR = re.compile(r"(?<![a-z])(?:projector|connector|aligner|merger|resampler)(?![a-z])")


class StageModules:
    """The modules of a stage, mapped to parts of the donor model.

    Args:
        recipe: the recipe, for error messages.
        stage: the stage with the modules. Without `modules:` it has a single one, the entire model.
        donor: the model that names the output's tensors.
    """

    def __init__(self, recipe: Recipe, stage: Stage, donor: Model) -> None:
        self.all = modules_of(stage)
        self._recipe = recipe
        self._stage = stage
        self._donor = donor
        self._layers = donor.layers
        names = {module.name for module in self.all} if stage.modules is not None else set()
        self._layerless = {name for name in names if self._layers.module(name) is None and self._has_layerless(name)}

    def stacks(self, module: Module) -> list[int]:
        """The numbers of the main stacks that a module's slices refer to. Raises RecipeError."""
        mains, name = self._layers.mains, self._donor.name
        sliced = any(source.layer_range is not None for part in module.slices or () for source in part.sources)
        if self._stage.modules is None:
            if sliced and len(mains) > 1:
                prefixes = " and ".join(stack.prefix for stack in mains)
                raise self._recipe.error(
                    module.place,
                    f"{name} has two stacks of layers, {prefixes}: use `modules` to choose the one for the slices",
                )
            if sliced and not mains:
                raise self._recipe.error(
                    (*module.place, "slices"),
                    f"{name} has no layers to slice: list complete models under `models`",
                )
            return list(range(len(mains)))
        stack = self._layers.module(module.name)
        if stack is None and module.name not in self._layerless:
            known = ", ".join(stack.prefix for stack in self._layers.stacks)
            raise self._recipe.error(
                module.place, f"{name} has no part named {module.name!r}; its stacks of layers: {known}"
            )
        if stack in mains:
            return [mains.index(stack)]
        if sliced:
            part = module.name if stack is None else f"the layers of {stack.prefix}"
            raise self._recipe.error(
                (*module.place, "slices"),
                f"{part} can't be sliced, only those of {' and '.join(s.prefix for s in mains)}: use `models` to take "
                "this part entirely",
            )
        return []

    def belongs(self, module: Module, name: str) -> bool:
        """Whether a tensor outside the main stacks' layers belongs to this module."""
        if self._stage.modules is None:
            return True
        owner = next((part for part in self._layerless if self._claims(part, name)), None)
        if owner is not None or module.name in self._layerless:
            return owner == module.name
        stack = self._layers.owner(name)
        if stack is None:
            return module is next(each for each in self.all if each.name not in self._layerless)
        return stack == self._layers.module(module.name)

    def covers(self, name: str) -> bool:
        """Whether a tensor belongs to any of the modules."""
        if self._stage.modules is None or self._layers.owner(name) is None:
            return True
        if any(self._claims(part, name) for part in self._layerless):
            return True
        return any(self._layers.owner(name) == self._layers.module(module.name) for module in self.all)

    def _has_layerless(self, name: str) -> bool:
        return any(self._claims(name, tensor) for tensor in self._donor.tensors)

    def _claims(self, part: str, name: str) -> bool:
        """Whether a tensor belongs to a part without layers."""
        if self._layers.split(name) is not None:
            return False
        if part == SHARED:
            return len(self._layers.mains) > 1 and self._layers.owner(name) is None
        return part == PROJECTOR and _PROJECTOR.search(name) is not None


def absent_part(first: Model, second: Model, name: str) -> str:
    """Advice for an error, if one of two models lacks a part of the other, such as a vision tower; else empty.

    Args:
        first: a model.
        second: another model, which lacks a tensor of the first one.
        name: name of the tensor.
    """
    label, prefix = part_of(name)
    if prefix and not any(other.startswith(prefix) for other in second.tensors):
        return (
            f". {second.name} has no {label} (tensors named {prefix}*): to copy that of {first.name}, add "
            f"`tensors_from: [{{filter: {prefix}, model: {first.name}}}]`"
        )
    for model, other in ((first, second), (second, first)):
        parts = [(stack, part) for stack, part in model.layers.parts if is_side_module(stack.prefix)]
        components = {component for name in other.tensors for component in name.split(".")} if parts else set()
        absent = [part for _, part in parts if part.rpartition(".")[2] not in components]
        texts = [part for stack, part in model.layers.parts if stack in model.layers.mains]
        if absent and texts:
            inside = tuple(f"{part}." for part in absent)  # Qwen2.5-VL's projector is visual.merger
            if any(_PROJECTOR.search(name) and not name.startswith(inside) for name in model.non_layer):
                absent.append(PROJECTOR)
            return (
                f". {other.name} has no {absent[0]}: to merge only the parts that both have, use {model.name} as "
                f"`base_model`, and list both models under `modules` for {' and '.join(texts)}, and only {model.name} "
                f"for {' and '.join(absent)}"
            )
    return ""
