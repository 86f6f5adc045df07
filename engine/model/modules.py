"""Assigns parts of a model to the modules of a recipe: stacks of layers, and tensors outside of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from ..recipe.types import Module, Recipe, Stage, modules_of
from .contents.diffusion import part_of
from .inputs import Model
from .layers import Stack
from .naming.parts import PROJECTOR_NAME, AmbiguousNames, match_part
from .roles import is_side_module

SHARED = "shared"
"""mergekit's name for the tensors that encoder and decoder share: T5's ``shared.weight`` and its head."""
PROJECTOR = "multi_modal_projector"
"""mergekit's name for the projector between vision encoder and text model, whatever its name in the model."""


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
        self._matched: dict[tuple[str, int], Mapping[str, str] | None] = {}
        self._covered: dict[int, Collection[str]] = {}

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

    def names(self, module: Module, model: Model) -> Iterable[str]:
        """The donor's names for a model's tensors outside the main stacks' layers that may belong to a module.

        Raises:
            RecipeError: if they can't be matched with the donor's.
        """
        matched = self._match(module, model)
        return model.non_layer if matched is None else matched

    def name_in(self, module: Module, model: Model, name: str) -> str | None:
        """The name that a tensor outside the main stacks' layers has in a model of a module; None if it lacks it.

        Args:
            module: the module.
            model: the model.
            name: the donor's name for the tensor.

        Raises:
            RecipeError: as `names`.
        """
        matched = self._match(module, model)
        if matched is None:
            return name if name in model.tensors else None
        return matched.get(name)

    def donor_names(self, model: Model) -> dict[str, str]:
        """The names of all tensors of a model, by the donor's names for them; what is not matched keeps its name."""
        stacks = {stack.prefix: number for number, stack in enumerate(model.layers.mains)}
        found: dict[str, str] = {}
        for name in model.tensors:
            layer = model.layers.split(name)
            wanted = () if layer is None else self._layers.mains[stacks[layer.stack] : stacks[layer.stack] + 1]
            found[f"{wanted[0].prefix}{name[len(layer.stack) :]}" if layer and wanted else name] = name
        for module in self.all:
            for new, name in (self._match(module, model) or {}).items():
                if new != name:
                    found.pop(name, None)
                    found[new] = name
        return found

    def _match(self, module: Module, model: Model) -> Mapping[str, str] | None:
        """The names of a model by the donor's names for them; None if they are the same."""
        key = module.name, model.number
        if key not in self._matched:
            stack = None if self._stage.modules is None or model is self._donor else self._layers.module(module.name)
            own = None if stack is None else self._counterpart(stack, module, model)
            try:
                matched = None if stack is None or own is None else match_part(self._donor, stack, model, own)
            except AmbiguousNames as error:
                raise self._recipe.error(
                    module.place,
                    f"{error}: name them as in {self._donor.name} with `rename` in the entry of {model.name}",
                ) from error
            self._matched[key] = matched
        return self._matched[key]

    def _counterpart(self, stack: Stack, module: Module, model: Model) -> Stack | None:
        """The stack of a model that is merged with a stack of the donor."""
        mains = self._layers.mains
        if stack in mains:
            number = mains.index(stack)
            return model.layers.mains[number] if number < len(model.layers.mains) else None
        return model.layers.module(stack.prefix) or model.layers.module(module.name)

    def covers(self, model: Model, name: str) -> bool:
        """Whether a tensor of a model belongs to any of the modules."""
        if self._stage.modules is None:
            return True
        if model is self._donor or not model.layers.mains:
            return self._covers(name)
        layer = model.layers.split(name)
        if layer is not None:
            number = next(n for n, stack in enumerate(model.layers.mains) if stack.prefix == layer.stack)
            wanted = self._layers.mains[number : number + 1]
            return any(self._layers.module(module.name) in wanted for module in self.all)
        if model.number not in self._covered:
            matched = [self._match(module, model) for module in self.all]
            known = {own for names in matched if names is not None for own in names.values()}
            same = (each for each in model.non_layer if each in self._donor.tensors and self._covers(each))
            self._covered[model.number] = known.union(same)
        return name in self._covered[model.number]

    def _covers(self, name: str) -> bool:
        """Whether a tensor of the donor belongs to any of the modules."""
        if self._layers.owner(name) is None:
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
        return part == PROJECTOR and PROJECTOR_NAME.search(name) is not None


def lone_projector(name: str, model: Model) -> str:
    """Advice for a tensor of a projector that only one model of a module has; empty for any other tensor."""
    if PROJECTOR_NAME.search(name) is None:
        return ""
    return f". List only {model.name} under a module `{PROJECTOR}`"


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
            if any(PROJECTOR_NAME.search(name) and not name.startswith(inside) for name in model.non_layer):
                absent.append(PROJECTOR)
            return (
                f". {other.name} has no {absent[0]}: to merge only the parts that both have, use {model.name} as "
                f"`base_model`, and list both models under `modules` for {' and '.join(texts)}, and only {model.name} "
                f"for {' and '.join(absent)}"
            )
    return ""
