"""Finds the output tensors that a stage copies from a model that its recipe names: those of ``tensors_from``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ...errors import RecipeError
from ...methods.kernel.method import Method
from ..model.inputs import BoundSlice, Model
from ..recipe.types import ModelReference, Module, Recipe, Slice, Source, Stage, stage_inputs
from .checks.filters import filter_advice
from .rules import TensorRules
from .usage import TensorUsage


class TensorSources:
    """The entries of a stage's ``tensors_from`` with their models.

    Args:
        recipe: the recipe, for error messages.
        stage: the stage.
        module: a module of the stage.
        method: the stage's merge method.
        models: the opened models.
        usage: record of the used input tensors.

    Attributes:
        models: the models that the entries name, each once.

    Raises:
        RecipeError: a filter matches no tensor of its model.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        module: Module,
        method: Method,
        models: Mapping[ModelReference, Model],
        usage: TensorUsage,
    ) -> None:
        self._recipe = recipe
        self._usage = usage
        self._entries = stage.tensors_from
        self._parts = [
            BoundSlice(recipe, stage, module, Slice((Source(each.model, None),), place=each.place), method, models)
            for each in self._entries
        ]
        self.models = tuple(dict.fromkeys(part.models[0] for part in self._parts))
        self._used: set[int] = set()
        for number, each in enumerate(self._entries):
            names = models[each.model].tensors
            if not any(each.filter in name for name in names):
                advice = filter_advice(each.filter, set(names))
                raise self._error(number, f"matches no tensor of {each.model.text}; {advice}")
        merged = {*stage_inputs(stage), stage.base_model}
        for model in self.models:
            for name in model.tensors if model.reference not in merged else ():
                usage.mark_unused(model, name, "`tensors_from` takes only other tensors of this model")

    def add(
        self,
        rules: TensorRules,
        name: str,
        models: Sequence[Model],
        names: Sequence[str | None],
        group: int,
        *,
        copied: bool = False,
    ) -> bool:
        """Add an output tensor if it is copied from the model that an entry names; returns whether it is.

        Args:
            rules: adds the tensor to the graph.
            name: name of the output tensor.
            models: the models that it would be merged from otherwise.
            names: name of the tensor in each of them, or None.
            group: group of the output.
            copied: whether `non_layer` takes the tensor from one of these models.

        Raises:
            RecipeError: the entry's model has no such tensor, or two entries or `non_layer` name different models.
        """
        part = self.part(name) if self._entries else None
        if part is None:
            return False
        (chosen,) = part.models
        if copied and chosen not in models:
            number = next(number for number, each in enumerate(self._entries) if each.filter in name)
            message = f"matches {name}, which `non_layer` takes from {models[0].name}: leave it out of one of the two"
            raise self._error(number, message)
        for model, own in zip(models, names, strict=True):
            if own is not None and (model is not chosen or own != name):
                self._usage.mark_unused(model, own, f"`tensors_from` takes it from {chosen.name}")
        rules.add(part, name, [name], 0.0, group, copied=True)
        return True

    def part(self, name: str) -> BoundSlice | None:
        """The model that an output tensor is copied from, as a slice; None if no filter matches its name.

        Raises:
            RecipeError: the model has no such tensor, or two entries name different models.
        """
        found = [number for number, each in enumerate(self._entries) if each.filter in name]
        if not found:
            return None
        first, *others = found
        chosen = self._entries[first]
        for number in others:
            if self._entries[number].model != chosen.model:
                message = f"matches {name}, which filter {chosen.filter!r} takes from {chosen.model.text}: "
                raise self._error(number, f"{message}write more of the names in one of the two filters", first)
        if name not in self._parts[first].models[0].tensors:
            message = f"matches {name}, which {chosen.model.text} does not have: write more of the name in the filter"
            raise self._error(first, message)
        self._used.update(found)
        return self._parts[first]

    def names(self) -> Iterator[str]:
        """The names of the tensors outside the layers that the entries take, whether or not other models have them."""
        for each, part in zip(self._entries, self._parts, strict=True):
            yield from (name for name in part.models[0].non_layer if each.filter in name)

    def check_used(self) -> None:
        """Raise RecipeError for a filter that matches no tensor of the output."""
        for number in range(len(self._entries)):
            if number not in self._used:
                raise self._error(number, "matches no tensor of the output: correct it, or remove the entry")

    def _error(self, number: int, problem: str, *others: int) -> RecipeError:
        entry = self._entries[number]
        place = (*entry.place, "filter")
        location = self._recipe.origins.locate(place, *((*self._entries[each].place, "filter") for each in others))
        return RecipeError.at(location, f"filter {entry.filter!r} {problem}")
