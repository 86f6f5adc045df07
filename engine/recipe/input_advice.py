"""Advice about the models of a slice: which base was meant, why the count is wrong, and what has no effect."""

from __future__ import annotations

from collections.abc import Sequence

from ...methods.kernel.method import Method
from .node_reader import NodeReader
from .types import (
    Conditional,
    Gradient,
    ModelReference,
    Settings,
    Slice,
    Source,
    Stage,
    base_index,
    modules_of,
    slices_of,
)
from .warnings import WarningKind

STACK = ": a slice merges its sources layer by layer; to stack layers, write one slice for each range"
"""Advice for sources of a slice that don't fit each other."""

_DROPPING = ("dare_linear", "dare_ties", "della", "della_linear")
"""Methods that drop elements at random, and none at the default density of 1."""


def similar_source(base: ModelReference, part: Slice) -> str:
    """Advice for a base model that is none of the sources: the source that is probably the same model, or empty."""
    name = _last(base)
    same = [source.model.text for source in part.sources if source.model != base and _last(source.model) == name]
    return f": if {same[0]} is the same model as {base.text}, write `base_model: {same[0]}`" if same else ""


def base_advice(base: ModelReference, part: Slice, method: Method) -> str:
    """Advice for a slice that doesn't list its base model: which of the sources to choose, or to add it to them."""
    if advice := similar_source(base, part):
        return advice
    choose = f"choose one of them, such as `base_model: {part.sources[0].model.text}`"
    if method.maximum is not None and len(part.sources) > method.maximum:
        return f": {choose}"
    enough = len(part.sources) > method.minimum
    return f": add it to `sources`, with as many layers as the others{f', or {choose}' if enough else ''}"


def missing_base(parts: Sequence[Slice], method: Method) -> str:
    """Advice for a stage without the base model that its method needs: one of its models, if enough others remain."""
    models = list(dict.fromkeys(source.model.text for part in parts for source in part.sources))
    if len(models) > method.minimum:
        return f", such as `base_model: {models[0]}`"
    return f" in addition to {' and '.join(models)}" if models else ""


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
    if len({source.layer_range for source in sources}) > 1 or method.name == "passthrough":
        return STACK
    return ": remove all but one, or use a method for any number of models, such as multislerp or task_arithmetic"


def ranges_misplaced(reader: NodeReader) -> bool:
    """Whether a complete model has a range of layers, which was reported."""
    places = [*(each.place for each in reader.warnings), *(each.path for each in reader.mistakes)]
    return any(place[-3:-2] == ("models",) and place[-1] in ("layers", "layer_range") for place in places)


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


def check_weight(reader: NodeReader, stage: Stage, method: Method) -> None:
    """Report the weight of a slice's only model that cancels, since the result is divided by the sum of the weights."""
    normalize = next((parameter for parameter in method.parameters if parameter.name == "normalize"), None)
    if normalize is None or reader.mistakes:
        return
    for module in modules_of(stage):
        for part in module.slices or ():
            base = base_index(stage, part, method)
            models = [source for index, source in enumerate(part.sources) if index != base]
            scopes = (part.parameters, module.parameters, stage.parameters)
            divided = next((scope["normalize"] for scope in scopes if "normalize" in scope), normalize.default)
            if len(models) != 1 or divided is not True or not _is_scaled(models[0], scopes):
                continue
            name = models[0].model.text
            reader.report(
                WarningKind.NO_EFFECT,
                f"the weight of {name}, the only model, has no effect: {method.name} divides by the sum of the weights",
                (*stage.place, "merge_method"),
                advice="set `normalize: false` under `parameters` if the weight should count, or use weight 1",
            )
            return


def _is_scaled(model: Source, scopes: Sequence[Settings]) -> bool:
    """Whether a model's weights are positive, and not all 1: only such weights cancel and seem to have an effect."""
    setting = next((scope["weight"] for scope in (model.parameters, *scopes) if "weight" in scope), 1)
    weights: list[object] = []
    for value in setting if isinstance(setting, tuple) else (setting,):
        inner = value.value if isinstance(value, Conditional) else value
        weights += inner.values if isinstance(inner, Gradient) else (inner,)
        if isinstance(value, Conditional) and value.filter in ("*", None):  # no later value is reached
            break
    numbers = [weight for weight in weights if isinstance(weight, (int, float))]
    return len(numbers) == len(weights) and all(number > 0 for number in numbers) and any(n != 1 for n in numbers)


def _last(model: ModelReference) -> str:
    """The last component of a model's path, without the case of its letters."""
    return model.path.rstrip("/").rpartition("/")[2].lower()
