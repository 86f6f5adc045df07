"""What becomes of every input tensor: used by a node of the graph, or left out for a reason that people are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..model.inputs import Model
from ..model.layers import is_head


@dataclass(frozen=True, slots=True)
class Unused:
    """Input tensors that no output needs.

    Args:
        model: the model that they are of.
        reason: why.
        tensors: their names.
    """

    model: str
    reason: str
    tensors: tuple[str, ...]


class TensorUsage:
    """Notes which input tensors are used, and why others aren't."""

    def __init__(self) -> None:
        self._used: set[tuple[int, str]] = set()
        self._reasons: dict[tuple[int, str], str] = {}

    def use(self, model: Model, name: str) -> None:
        """A node reads the tensor."""
        self._used.add((model.number, name))

    def leave(self, model: Model, name: str, reason: str) -> None:
        """No node needs the tensor, as far as this output tensor goes."""
        self._reasons[model.number, name] = reason

    def unused(
        self, models: Sequence[Model], sources: Sequence[Model], *, head: bool, covered: Callable[[str], bool]
    ) -> Iterator[Unused]:
        """Every input tensor that no node reads, with the reason; files that an index doesn't name, too.

        Args:
            models: all of them.
            sources: those that a slice takes tensors from.
            head: whether the output has a head.
            covered: whether a tensor's name belongs to a part of the model that the recipe is about.
        """
        for model in models:
            reasons: dict[str, list[str]] = {}
            for name in model.checkpoint.tensors:
                if (model.number, name) in self._used:
                    continue
                if model not in sources:
                    reason = "the base model is no input of this recipe"
                elif not covered(name):
                    reason = "no module of the recipe is about this part of the model"
                else:
                    reason = self._reasons.get((model.number, name)) or _reason(model, name, head)
                reasons.setdefault(reason, []).append(name)
            for reason, names in reasons.items():
                yield Unused(model.name, reason, tuple(names))
            for file in model.checkpoint.ignored:
                yield Unused(model.name, f"{file.name} is not named by the index", ())


def _reason(model: Model, name: str, head: bool) -> str:
    layer = model.layers.split(name)
    if layer is not None:
        return f"layer {layer.index} is in no slice"
    if is_head(name) and not head:
        return "the output's head is tied to its embedding"
    return "outside the layers, which come from the first and the last slice"
