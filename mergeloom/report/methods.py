"""A merge method as `mergeloom methods NAME` shows it."""

from __future__ import annotations

from ..methods.kernel.contract import Base, Method, Parameter
from .sections import Grid, Section

_BASES = {Base.NONE: "has no place for one", Base.OPTIONAL: "optional", Base.REQUIRED: "required"}


def method_sections(method: Method) -> list[Section]:
    """What the method does, what it takes, and its parameters."""
    fields = [("models", _models(method)), ("base model", _BASES[method.base])]
    if method.paper is not None:
        fields.append(("paper", method.paper))
    sections = [Section(method.name, fields), Section("What it does", lines=(method.description,))]
    if method.parameters:
        rows = tuple(
            (p.name, p.type.__name__, _default(p), p.values, "each model" if p.per_input else "the slice", p.doc)
            for p in method.parameters
        )
        sections.append(
            Section("Parameters", grid=Grid(("name", "type", "default", "range", "set for", "meaning"), rows))
        )
    return sections


def _models(method: Method) -> str:
    if method.maximum == method.minimum:
        number = str(method.minimum)
    else:
        number = f"{method.minimum} or more" if method.maximum is None else f"{method.minimum} to {method.maximum}"
    return number + ("" if method.base is Base.NONE else ", besides the base")


def _default(parameter: Parameter) -> str:
    if parameter.required:
        return "required"
    return str(parameter.default).lower() if parameter.type is bool else str(parameter.default)
