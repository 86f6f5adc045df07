"""Finds the input tensors that the graph does not use, with the reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...io.units import plural
from ..model.contents.diffusion import EMA
from ..model.inputs import Model
from ..model.logical import part_names
from ..model.roles import is_head
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
        for model in models:
            causes: dict[tuple[str, int | None], list[str]] = {}
            complete = counts[model.number] == len(model.checkpoint.tensors)
            for name in () if complete else self._unread(model):
                if model not in sources:
                    cause: tuple[str, int | None] = "the base model is not an input of this recipe", None
                elif not covered(model, name):
                    cause = "no module of the recipe includes this part of the model", None
                elif reason := self._reasons.get((model.number, name)):
                    cause = reason, None
                else:
                    cause = _cause(model, name, head)
                causes.setdefault(cause, []).append(name)
            for (why, layer), names in causes.items():
                yield Unused(model.name, why, tuple(names), layer)
            for file in model.checkpoint.ignored:
                yield Unused(model.name, _stray(model, file), ())

    def _unread(self, model: Model) -> Iterator[str]:
        """The names of a model's tensors that no node reads."""
        pairs = zip(self._graph.read_models, self._graph.read_names, strict=True)
        read = {name for number, name in pairs if number == model.number}
        return (name for name in model.tensors if not read.issuperset(part_names(model.tensors, name)))


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
