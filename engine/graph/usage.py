"""Finds the input tensors that the graph does not use, with the reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...io.units import plural
from ..model.contents.diffusion import EMA
from ..model.inputs import Model
from ..model.logical import LogicalTensor, LogicalTensors
from ..model.roles import is_head
from ..recipe.types import ModelReference
from .graph import MergeGraph


@dataclass(frozen=True, slots=True)
class Unused:
    """Input tensors of one model that no output needs, for the same cause.

    Args:
        model: name of the model in the recipe.
        cause: why they are unused, such as ``in no slice``.
        tensors: names of the tensors.
        layer: the layer that contains all of them, if the cause concerns a layer; else None.
    """

    model: str
    cause: str
    tensors: tuple[str, ...]
    layer: int | None = None

    @property
    def reason(self) -> str:
        """The cause with the layer, such as ``layer 4 is in no slice``."""
        return self.cause if self.layer is None else f"layer {self.layer} is {self.cause}"


class TensorUsage:
    """Records why output tensors don't need input tensors.

    Args:
        graph: the graph, whose reads are the tensors that are used.
    """

    def __init__(self, graph: MergeGraph) -> None:
        self._graph = graph
        self._reasons: dict[tuple[int, str], str] = {}

    @property
    def marked(self) -> int:
        """The number of tensors for which a reason is recorded."""
        return len(self._reasons)

    def mark_unused(self, model: Model, name: str, reason: str) -> None:
        """Record why an output tensor doesn't need the tensor; another one may still use it."""
        self._reasons[model.number, name] = reason

    def drop_ema_copy(self, name: str, models: Sequence[Model], names: Sequence[str | None]) -> bool:
        """Record a tensor of an EMA copy that some models lack as unused; returns whether the tensor is one.

        Args:
            name: name of the output tensor.
            models: the models that it would be merged from.
            names: name of the tensor in each of them, or None.
        """
        if None not in names or not name.startswith(EMA):
            return False
        lacking = models[names.index(None)].name
        for model, own in zip(models, names, strict=True):
            if own is not None:
                self.mark_unused(model, own, f"{lacking} has no EMA copy, which only training needs")
        return True

    def unused(
        self, models: Sequence[Model], sources: Sequence[Model], *, head: bool, covered: Callable[[Model, str], bool]
    ) -> Iterator[Unused]:
        """Every input tensor that no node reads, with the cause, and every other file.

        Args:
            models: all input models.
            sources: the models that slices take tensors from.
            head: whether the output has a head.
            covered: whether a tensor of a model belongs to a module of the recipe.
        """
        counts = Counter(self._graph.read_models)
        unread = UnreadTensors(self._graph, models)
        for model in sorted(models, key=lambda each: not each.named):  # a base after the models that have its tensors
            causes: dict[tuple[str, int | None], list[str]] = {}
            complete = model.has_files and counts[model.number] == len(model.checkpoint.tensors)
            for name in () if complete else unread.of(model):
                if not model.named:
                    cause: tuple[str, int | None] = REPLACED, None
                elif model not in sources:
                    cause = "the base model is not an input of this recipe", None
                elif not covered(model, name):
                    cause = "no module of the recipe includes this part of the model", None
                elif reason := self._reasons.get((model.number, name)):
                    cause = reason, None
                else:
                    cause = _cause(model, name, head)
                causes.setdefault(cause, []).append(name)
            for (why, layer), names in causes.items():
                yield Unused(model.name, why, tuple(names), layer)
            for file in model.checkpoint.ignored if model.has_files else ():
                yield Unused(model.name, _stray(model, file), ())


REPLACED = "an adapter has its own tensor instead"
"""Why a tensor of a base is unused that is only named with adapters, although the value of its name is used."""


class UnreadTensors:
    """Finds the tensors of models that a graph does not read, each once: a base is shared by models with adapters.

    Args:
        graph: the graph.
        models: its models.
    """

    def __init__(self, graph: MergeGraph, models: Sequence[Model]) -> None:
        self._numbers = {model.reference: model.number for model in models}
        self._graph = graph

    @cached_property
    def _read(self) -> dict[int, set[str]]:
        """The names that are read of each model, and those that were reported."""
        read: dict[int, set[str]] = {}
        for number, name in zip(self._graph.read_models, self._graph.read_names, strict=True):
            read.setdefault(number, set()).add(name)
        return read

    def of(self, model: Model) -> Iterator[str]:
        """Yield the names of a model's tensors of which a part is not read, unless it was reported for another."""
        if model.has_files and not isinstance(model.tensors, LogicalTensors):
            read = self._read.setdefault(model.number, set())
            unread_names = [name for name in model.tensors if name not in read]
            read.update(unread_names)
            yield from unread_names
            return
        found: list[tuple[set[str], str]] = []
        for name in model.tensors:
            unread = [
                (self._read.setdefault(number, set()), part)
                for owner, part in stored_parts(model, name)
                if (number := self._numbers.get(owner)) is not None and part not in self._read.get(number, ())
            ]
            if unread:
                found += unread
                yield name
        for known, part in found:  # afterwards: a stored tensor can be a part of several values, such as experts
            known.add(part)


def stored_parts(model: Model, name: str) -> list[tuple[ModelReference, str]]:
    """Return the stored tensors that a model's tensor is computed from, each with the model whose files have it."""
    tensor = model.tensors[name] if isinstance(model.tensors, LogicalTensors) else None
    if not isinstance(tensor, LogicalTensor):
        return [(model.reference.base, name)]
    return [(part.owner or model.reference.base, part.name) for part in tensor.parts]


def _stray(model: Model, file: Path) -> str:
    """Why a .safetensors file in the model's directory is not used."""
    index = model.checkpoint.index
    if index is not None:
        return f"{file.name} is not in {index.name}"
    first, *others = model.checkpoint.files
    more = f" and {plural(len(others), 'other file')}" if others else ""
    return f"{file.name} is not read: the weights are in {first.name}{more}"


def _cause(model: Model, name: str, head: bool) -> tuple[str, int | None]:
    """The cause and the layer of a tensor that no rule has dropped."""
    layer = model.layers.split(name)
    if layer is not None:
        return "in no slice", layer.index
    if is_head(name) and not head:
        return "the output's head is tied to its embedding", None
    return "tensors outside the layers come from the first and the last slice", None
