"""Which part of a model each module of a recipe is about: stacks of layers, and what stands beside them."""

from __future__ import annotations

import re

from ..recipe.types import Module, Recipe, Stage, modules_of
from .inputs import Model

SHARED = "shared"
"""mergekit's name for what encoder and decoder have in common: T5's ``shared.weight`` and its head."""
PROJECTOR = "multi_modal_projector"
"""mergekit's name for what stands between a vision tower and the text model, whatever the model calls it."""
_PROJECTOR = re.compile(r"(?<![a-z])(?:projector|connector|aligner|merger|resampler)(?![a-z])")


class StageModules:
    """The modules of a stage, as parts of the model that its tensors are named after.

    Args:
        recipe: says where a mistake stands.
        stage: whose modules they are. One without `modules:` has a single one, which is all of the model.
        donor: the model.
    """

    def __init__(self, recipe: Recipe, stage: Stage, donor: Model) -> None:
        self.all = modules_of(stage)
        self._recipe = recipe
        self._stage = stage
        self._donor = donor
        self._layers = donor.layers
        names = {module.name for module in self.all} if stage.modules is not None else set()
        self._loose = {name for name in names if self._layers.module(name) is None and self._has_loose(name)}

    def stacks(self, module: Module) -> list[int]:
        """The numbers of the main stacks that a module's slices are about. Raises RecipeError."""
        mains, name = self._layers.mains, self._donor.name
        sliced = any(source.layer_range is not None for part in module.slices or () for source in part.sources)
        if self._stage.modules is None:
            if sliced and len(mains) > 1:
                prefixes = " and ".join(stack.prefix for stack in mains)
                raise self._recipe.error(
                    module.place,
                    f"{name} has two stacks of layers, {prefixes}: say under `modules` which one the slices are of",
                )
            if sliced and not mains:
                raise self._recipe.error(
                    (*module.place, "slices"),
                    f"{name} has no layers that could be sliced: list whole models under `models`",
                )
            return list(range(len(mains)))
        stack = self._layers.module(module.name)
        if stack is None and module.name not in self._loose:
            known = ", ".join(stack.prefix for stack in self._layers.stacks)
            raise self._recipe.error(
                module.place, f"no part of {name} is called {module.name!r}; its layers are in: {known}"
            )
        if stack in mains:
            return [mains.index(stack)]
        if sliced:
            part = module.name if stack is None else f"the layers of {stack.prefix}"
            raise self._recipe.error(
                (*module.place, "slices"),
                f"{part} can't be sliced, only those of {' and '.join(s.prefix for s in mains)}: take this part whole, "
                "with `models`",
            )
        return []

    def belongs(self, module: Module, name: str) -> bool:
        """Whether a tensor outside the main stacks' layers is of this module."""
        if self._stage.modules is None:
            return True
        owner = next((loose for loose in self._loose if self._claims(loose, name)), None)
        if owner is not None or module.name in self._loose:
            return owner == module.name
        stack = self._layers.owner(name)
        if stack is None:
            return module is next(each for each in self.all if each.name not in self._loose)
        return stack == self._layers.module(module.name)

    def covers(self, name: str) -> bool:
        """Whether a tensor is of any of the modules."""
        if self._stage.modules is None or self._layers.owner(name) is None:
            return True
        if any(self._claims(loose, name) for loose in self._loose):
            return True
        return any(self._layers.owner(name) == self._layers.module(module.name) for module in self.all)

    def _has_loose(self, name: str) -> bool:
        return any(self._claims(name, tensor) for tensor in self._donor.checkpoint.tensors)

    def _claims(self, loose: str, name: str) -> bool:
        """Whether a tensor is of a part without layers."""
        if self._layers.split(name) is not None:
            return False
        if loose == SHARED:
            return len(self._layers.mains) > 1 and self._layers.owner(name) is None
        return loose == PROJECTOR and _PROJECTOR.search(name) is not None
