"""Reports optional tensors that only some of the models have that they are merged from, such as biases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ....io.units import plural
from ...model.inputs import Model
from ...model.warnings import ModelWarning, ModelWarningKind


@dataclass(frozen=True, slots=True)
class PartialTensor:
    """An output tensor that some of its sources lack.

    Args:
        name: name of the output tensor.
        present: numbers of the models that have it.
        absent: numbers of the models that lack it.
    """

    name: str
    present: tuple[int, ...]
    absent: tuple[int, ...]

    @classmethod
    def of(cls, name: str, models: Sequence[Model], names: Sequence[str | None]) -> PartialTensor:
        """Sort the models by whether they have a name for the tensor."""
        pairs = list(zip(models, names, strict=True))
        present = dict.fromkeys(model.number for model, own in pairs if own is not None)
        return cls(name, tuple(present), tuple(dict.fromkeys(model.number for model, own in pairs if own is None)))


def partial_warnings(partial: Iterable[PartialTensor], models: Sequence[Model], method: str) -> Iterator[ModelWarning]:
    """Warn about tensors that some models lack, once for all tensors with the same models.

    Args:
        partial: the tensors.
        models: all input models, by number.
        method: name of the merge method.
    """
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for each in partial:
        groups.setdefault((each.present, each.absent), []).append(each.name)
    for (present, absent), names in groups.items():
        have, lack = (", ".join(models[number].name for number in numbers) for numbers in (present, absent))
        shown = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
        verb, they = ("is", "it") if len(names) == 1 else ("are", "them")
        yield ModelWarning(
            ModelWarningKind.OPTIONAL_TENSOR,
            f"{plural(len(names), 'tensor')} {verb} in {have} and not in {lack} ({shown}): {method} takes {they} from "
            f"{have} only, at full strength",
            f"add zeros under {'this name' if len(names) == 1 else 'these names'} to {lack} to merge {they} like the "
            "other tensors",
            tuple(names),
        )
