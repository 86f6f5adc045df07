"""Advice about the models of a slice: which base was meant, why the count is wrong, and what has no effect."""

from __future__ import annotations

from ...methods.kernel.method import Method
from .node_reader import NodeReader
from .types import ModelReference, Slice, Stage, modules_of, slices_of
from .warnings import WarningKind

STACK = ": a slice merges its sources layer by layer; to stack layers, write one slice for each range"
"""Advice for sources of a slice that don't fit each other."""

_DROPPING = ("dare_linear", "dare_ties", "della", "della_linear")
"""Methods that drop elements at random, and none at the default density of 1."""


def similar_source(base: ModelReference, part: Slice) -> str:
    """Advice for a base model that is none of the sources: the source that is probably the same model, or empty."""
    name = _last(base)
    same = [source.model.text for source in part.sources if source.model != base and _last(source.model) == name]
    return f": if {same[0]} is the same model, write `base_model: {same[0]}`" if same else ""


def count_advice(part: Slice, method: Method, base: int | None) -> str:
    """Advice for a slice with too many or too few sources for its method.

    Args:
        part: the slice.
        method: the merge method.
        base: index of the base model among the sources, or None.
    """
    sources = part.sources
    listed = sources[-1].place[-1:] == ("base_model",)
    if base is not None and len(sources) == 1 and not listed:
        return f": only the base model, {sources[0].model.text}, is listed, and merging it with itself changes nothing"
    too_many = method.maximum is not None and len(sources) - (base is not None) > method.maximum
    if not too_many:
        return ""
    if listed and (advice := similar_source(sources[-1].model, part)):
        return advice
    if listed and base is None:
        return " (a `base_model` that isn't listed under `models` is added to them)"
    return STACK if len({source.layer_range for source in sources}) > 1 else ""


def check_density(reader: NodeReader, stage: Stage, method: Method) -> None:
    """Report a method that drops elements at random, but has no density and so drops nothing."""
    if method.name not in _DROPPING or reader.mistakes:
        return
    parts = slices_of(stage)
    scopes = [stage.parameters, *(module.parameters for module in modules_of(stage))]
    scopes += [part.parameters for part in parts]
    scopes += [source.parameters for part in parts for source in part.sources]
    if not any("density" in scope for scope in scopes):
        reader.report(
            WarningKind.NO_EFFECT,
            f"{method.name} drops nothing: `density` is 1 by default",
            (*stage.place, "merge_method"),
            advice="set `density` under `parameters`, such as 0.5, which drops half of each task vector",
        )


def _last(model: ModelReference) -> str:
    """The last component of a model's path, without the case of its letters."""
    return model.path.rstrip("/").rpartition("/")[2].lower()
