"""Counts which values of filters and gradients the tensors of a stage use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .types import Scalar


@dataclass(frozen=True, slots=True)
class Use:
    """One value of a parameter and the tensors that use it.

    Args:
        filter: substring of the tensors' names; None for all tensors that no filter before it matches.
        values: the value, or several for a gradient.
        default: whether it is the method's default.
        tensors: number of tensors.
        at_start: names of the tensors that use a gradient's first value.
    """

    filter: str | None
    values: tuple[Scalar, ...]
    default: bool
    tensors: int
    at_start: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """What identifies the value, without the tensors."""
        return self.filter, self.values, self.default


@dataclass(frozen=True, slots=True)
class ParameterUse:
    """A parameter with filters or gradients.

    Args:
        stage: name of the stage, or None.
        parameter: name of the parameter.
        model: the model that it is set for; None for all.
        uses: the values in the order in which they are tried.
    """

    stage: str | None
    parameter: str
    model: str | None
    uses: tuple[Use, ...]


def summarize_uses(found: Iterable[ParameterUse]) -> tuple[ParameterUse, ...]:
    """Add up the uses of equal values over the slices of a stage, and combine models with equal values.

    Models with equal values use them for the same tensors, except for optional ones: the largest count is kept.
    """
    by_model: dict[tuple[object, ...], ParameterUse] = {}
    for each in found:
        key = (each.stage, each.parameter, each.model, *(use.key for use in each.uses))
        known = by_model.get(key)
        by_model[key] = each if known is None else replace(known, uses=_added(known.uses, each.uses))
    models: dict[tuple[str | None, str], list[ParameterUse]] = {}
    for each in by_model.values():
        models.setdefault((each.stage, each.parameter), []).append(each)
    summary: list[ParameterUse] = []
    for group in models.values():
        if len(group) > 1 and len({tuple(use.key for use in each.uses) for each in group}) == 1:
            most = max(group, key=lambda each: sum(use.tensors for use in each.uses))
            group = [replace(most, model=None)]
        summary += group
    return tuple(summary)


def _added(first: tuple[Use, ...], second: tuple[Use, ...]) -> tuple[Use, ...]:
    """The uses of equal values in two slices; a tensor outside the layers can be in both lists of names."""
    return tuple(
        replace(a, tensors=a.tensors + b.tensors, at_start=tuple(dict.fromkeys((*a.at_start, *b.at_start))))
        for a, b in zip(first, second, strict=True)
    )
