"""The merge methods as `mergeloom methods` shows them."""

from __future__ import annotations

from collections.abc import Iterable

from ..methods.kernel.method import Method
from ..methods.kernel.signature import Parameter
from ..methods.kernel.spec import Base
from .sections import Grid, Section

_BASES = {Base.NONE: "not used", Base.OPTIONAL: "optional", Base.REQUIRED: "required"}


def method_list_section(methods: Iterable[Method]) -> Section:
    """List methods by name, with their summaries."""
    rows = tuple((method.name, method.summary) for method in sorted(methods, key=lambda method: method.name))
    return Section("Merge methods", grid=Grid(("name", "summary"), rows))


def method_sections(method: Method) -> list[Section]:
    """Describe a method: its models, its paper, what it does, and its parameters."""
    fields = [("models", _models(method)), ("base model", _BASES[method.base])]
    if method.paper is not None:
        fields.append(("paper", method.paper))
    sections = [Section(method.name, fields), Section("Description", lines=(method.description,))]
    if method.parameters:
        rows = tuple(
            (p.name, p.type.__name__, _default(p), p.values, "each model" if p.per_input else "the slice", p.doc)
            for p in method.parameters
        )
        header = ("name", "type", "default", "range", "set for", "description")
        sections.append(Section("Parameters", grid=Grid(header, rows)))
    return sections


def _models(method: Method) -> str:
    if method.maximum == method.minimum:
        number = str(method.minimum)
    else:
        number = f"{method.minimum} or more" if method.maximum is None else f"{method.minimum} to {method.maximum}"
    return number + ("" if method.base is Base.NONE else ", plus the base model")


def _default(parameter: Parameter) -> str:
    if parameter.required:
        return "required"
    return str(parameter.default).lower() if parameter.type is bool else str(parameter.default)
