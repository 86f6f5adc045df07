"""A base that is listed among the models, and slices that keep only what is outside a model's layers."""

from __future__ import annotations

import pytest

from mergeloom.engine.recipe.load import parse_recipe
from mergeloom.engine.recipe.warnings import WarningKind
from mergeloom.errors import RecipeError
from mergeloom.methods import merge_methods
from mergeloom.methods.kernel.spec import Base
from tests.unit.recipe.parsing import parse, refused

METHODS = merge_methods()
WITH_BASE = sorted(
    name
    for name, method in METHODS.items()
    if method.base is not Base.NONE and any(parameter.name == "weight" for parameter in method.parameters)
)
TIES = """\
merge_method: ties
base_model: base
models:
  - model: base
    parameters: {weight: 0.3, density: 0.5}
  - {model: a, parameters: {weight: 1, density: 0.5}}
"""


def test_a_weight_of_the_base() -> None:
    (warning,) = parse(TIES).warnings
    assert warning.kind is WarningKind.NO_EFFECT
    assert str(warning) == (
        "r.yml:5: models[0].parameters: `weight` and `density` of the base model, base, have no effect: ties merges "
        "the other models into it; remove them, or use another `base_model` if this model should be merged, too"
    )
    assert refused(TIES, strict=True) == str(warning)
    assert parse(TIES.replace("    parameters: {weight: 0.3, density: 0.5}\n", "")).warnings == ()
    assert parse(TIES.replace("base_model: base", "base_model: other")).warnings == ()


@pytest.mark.parametrize("name", WITH_BASE)
def test_every_method_with_weights_and_a_base(name: str) -> None:
    models = ["base", "a", "b"][: 3 if METHODS[name].maximum != 1 else 2]
    listed = ", ".join(f"{{model: {model}, parameters: {{weight: 0.5}}}}" for model in models)
    text = f"merge_method: {name}\nbase_model: base\nmodels: [{listed}]\n"
    text += "parameters: {density: 0.5}\n" if name.startswith(("dare", "della")) else ""
    (warning,) = parse_recipe(text, methods=METHODS).warnings
    assert warning.kind is WarningKind.NO_EFFECT
    assert "`weight` of the base model, base, has no effect" in str(warning)


def test_a_base_of_slices() -> None:
    sources = "[{model: base, layer_range: [0, 2], parameters: {weight: 1}}, {model: a, layer_range: [0, 2]}]"
    text = f"merge_method: ties\nbase_model: base\nparameters: {{weight: 1}}\nslices: [{{sources: {sources}}}]\n"
    (warning,) = parse(text).warnings
    assert warning.place == ("slices", 0, "sources", 0, "parameters")
    # methods without a base merge the model like the others
    assert parse(text.replace("ties", "linear")).warnings == ()


@pytest.mark.parametrize("number", [0, 32])
def test_an_empty_slice_says_how_to_keep_a_head(number: int) -> None:
    source = f"{{model: owner/name, layer_range: [{number}, {number}]}}"
    text = f"merge_method: passthrough\nslices: [{{sources: [{source}]}}]\n"
    message = refused(text)
    assert (
        f"[{number}, {number}] is empty; for layer {number} alone, write [{number}, {number + 1}]: the second "
        in message
    )
    assert "remove the slice and set `non_layer: {head: owner/name}`; other keys there are `norm` and" in message
    assert "non_layer" not in refused(text.replace(f"[{number}, {number}]", "[5, 2]"))
    fixed = text.replace(f"[{number}, {number}]", "[0, 4]") + "non_layer: {head: owner/name}\n"
    assert parse(fixed).output.non_layer.head is not None


def test_all_methods_with_a_base_are_covered() -> None:
    assert {"ties", "task_arithmetic", "dare_ties", "dare_linear", "della", "breadcrumbs"} <= set(WITH_BASE)
    text = "merge_method: model_stock\nbase_model: base\nmodels:\n"
    text += "  - {model: base, parameters: {weight: 1}}\n  - {model: a}\n  - {model: b}\n"
    (warning,) = parse_recipe(text, methods=METHODS).warnings
    assert warning.kind is WarningKind.UNKNOWN_PARAMETER
    with pytest.raises(RecipeError, match="model_stock has no such parameter"):
        parse_recipe(text, methods=METHODS, strict=True)
