"""Describes parameters with filters and gradients: how many tensors use each value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engine.recipe.parameters import gradient_value
from ..io.units import listed, plural
from .sections import Section

if TYPE_CHECKING:
    from ..engine.recipe.parameter_uses import ParameterUse, Use
    from ..engine.recipe.types import Scalar
    from ..engine.run.plan import Plan

_PARAMETERS = 12
_NAMES = 4


def parameters_section(plan: Plan) -> Section | None:
    """List the parameters with filters or gradients, and how many tensors use each value; None if there are none."""
    found = plan.built.parameters
    if not found:
        return None
    fields = []
    for parameter in found[:_PARAMETERS]:
        label = parameter.parameter + (f" of {parameter.model}" if parameter.model is not None else "")
        label += f" in {parameter.stage}" if parameter.stage is not None else ""
        fields += [(label, _text(parameter)), *_outside_layers(plan, parameter, label)]
    lines = []
    if len(found) > _PARAMETERS:
        lines = [f"and {len(found) - _PARAMETERS} more; `mergeloom plan --explain TENSOR` shows the values of a tensor"]
    return Section("Filters and gradients", fields, lines=lines)


def _text(parameter: ParameterUse) -> str:
    filtered = any(use.filter is not None for use in parameter.uses)
    return "; ".join(_use(use, filtered=filtered) for use in parameter.uses)


def _use(use: Use, *, filtered: bool) -> str:
    """Format a value and its tensors: ``'mlp' (21 tensors): 0.5``."""
    who = repr(use.filter) if use.filter is not None else ("the rest" if filtered else "all")
    default = " (default)" if use.default else ""
    return f"{who} ({plural(use.tensors, 'tensor')}): {_value(use.values)}{default}"


def _value(values: tuple[Scalar, ...]) -> str:
    """Format a value, or the first, middle and last value of a gradient."""
    if len(values) == 1:
        return format_value(values[0])
    first, middle, last = (format_value(gradient_value(values, t)) for t in (0.0, 0.5, 1.0))  # type: ignore[arg-type]
    return f"{first} in the first layer of a slice, {middle} in the middle, {last} in the last"


def _outside_layers(plan: Plan, parameter: ParameterUse, label: str) -> list[tuple[str, str]]:
    """Name the tensors outside the layers that use a gradient's first value."""
    split = plan.built.models[plan.built.donor].layers.split
    fields = []
    for use in parameter.uses:
        names = [name for name in use.at_start if split(name) is None]
        if names:
            text = f"{format_value(use.values[0])}, the gradient's first value: {listed(names, _NAMES)}"
            fields.append((f"{label} outside layers", text))
    return fields


def format_value(value: object) -> str:
    """Format a parameter's value as in a recipe."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
