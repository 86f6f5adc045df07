"""Warnings about filters that match no tensor: where they are, and what was probably meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.graph.build import build_graph
from mergeloom.engine.model.warnings import ModelWarning, ModelWarningKind
from mergeloom.engine.recipe.load import load_recipe
from mergeloom.errors import RecipeError
from mergeloom.methods import merge_methods
from tests.unit.graph.building import checkpoint, decoder

RESTS = dict.fromkeys(("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"), (4, 4))
RECIPE = """\
merge_method: linear
parameters:
  weight: {filter: mlp, value: 1}
models:
- model: a
  parameters:
    weight:
    - filter: self_atn
      value: 0.5
    - value: 1
- model: b
  parameters:
    weight:
    - {filter: self_atn, value: 0.5}
    - {filter: q_proj, value: 0.5}
    - {filter: "*", value: 1}
"""


def filter_warnings(recipe: Path | dict[str, Any], *overrides: str) -> list[ModelWarning]:
    """The warnings about the filters of a recipe of models of four layers."""
    methods = merge_methods()
    loaded = load_recipe(recipe, methods=methods, overrides=overrides)
    built = build_graph(loaded, loaded.output, methods, lambda each: checkpoint(each.path, decoder(4, rests=RESTS)))
    return [warning for warning in built.warnings if warning.kind is ModelWarningKind.FILTER]


def filtered(substring: str) -> dict[str, Any]:
    """A recipe with this filter."""
    weight = [{"filter": substring, "value": 0.5}, {"value": 1}]
    return {"merge_method": "linear", "models": [{"model": m} for m in "ab"], "parameters": {"weight": weight}}


def test_a_warning_has_the_line_and_the_nearest_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yml").write_text(RECIPE)
    (warning,) = filter_warnings(Path("r.yml"))
    assert str(warning) == (
        "r.yml:8: models[0].parameters.weight[0].filter: filter 'self_atn' matches no tensor name: its value is not "
        "used (also on line 14); did you mean `self_attn`?"
    )
    assert warning.names == ("self_atn",)
    (_, other) = filter_warnings(Path("r.yml"), "models.1.parameters.weight.2.filter=MPL", "parameters.weight=1")
    assert str(other).startswith(
        "r.yml with --set models.1.parameters.weight.2.filter=MPL: models[1].parameters.weight[2].filter: filter 'MPL' "
    )


def test_the_warning_explains_the_error_that_a_misspelt_filter_causes() -> None:
    with pytest.raises(RecipeError, match="no filter matches its name") as raised:
        filter_warnings(filtered("self_atn"), "parameters.weight.1.filter=mlp")
    (warning,) = raised.value.warnings
    assert warning.startswith("recipe: parameters.weight[0].filter: filter 'self_atn' matches no tensor name")


def test_a_recipe_without_lines(tmp_path: Path) -> None:
    recipe = filtered("self_atn")
    for model in recipe["models"]:
        model["parameters"] = recipe["parameters"]
    (warning,) = filter_warnings(recipe)
    assert str(warning).startswith(
        "recipe: parameters.weight[0].filter: filter 'self_atn' matches no tensor name: its value is not used (also in "
        "2 other places); "
    )


@pytest.mark.parametrize(
    ("substring", "advice"),
    [
        ("mpl", "did you mean `mlp`?"),
        ("MLP", "did you mean `mlp`?"),
        ("selfattn", "did you mean `self_attn`?"),
        ("self-attn", "did you mean `self_attn`?"),
        ("atn", "did you mean `attn`?"),
        ("mlp.donw_proj", "did you mean `mlp.down_proj`?"),
        ("layer.3.", "did you mean `layers.3.`?"),
        (".layer.2.self_atn.", "did you mean `.layers.2.self_attn.`?"),
        ("layer.40.mlp", "names are such as `model.layers.0.input_layernorm.weight`"),
        ("vision_tower", "names are such as `model.layers.0.input_layernorm.weight`"),
        ("*mlp*", "a filter is a part of tensor names, without wildcards; did you mean `mlp`?"),
        (
            "layers.*.mlp",
            "a filter is a part of tensor names, without wildcards; names are such as "
            "`model.layers.0.input_layernorm.weight`",
        ),
    ],
)
def test_the_nearest_part_of_a_name_is_suggested(substring: str, advice: str) -> None:
    (warning,) = filter_warnings(filtered(substring))
    assert warning.advice == advice
    if "`?" in advice:
        assert filter_warnings(filtered(advice.partition("mean `")[2].removesuffix("`?"))) == []


@pytest.mark.parametrize("substring", ["mlp", "layers.3.", "*", "", "q_proj.weight"])
def test_a_filter_that_matches_causes_no_warning(substring: str) -> None:
    assert filter_warnings(filtered(substring)) == []
