"""``--set KEY=VALUE``: changes of a recipe before it is validated."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mergeloom.engine.recipe.load import load_recipe
from mergeloom.engine.recipe.overrides import override, uniform_layout
from mergeloom.engine.recipe.yaml import parse_yaml
from mergeloom.errors import RecipeError, UsageError
from mergeloom.methods import merge_methods

RECIPE = """\
merge_method: linear
models:
- model: a
  parameters: {weight: 0.5}
- model: b
  parameters: &shared {weight: 0.5}
"""
STAGES = """\
name: first
merge_method: passthrough
models: [{model: a}]
---
merge_method: passthrough
models: [{model: first}]
"""


def changed(text: str, *overrides: str) -> list[object]:
    """Return the documents of a recipe with these overrides."""
    return [node.plain() for node in override(parse_yaml(text), overrides).documents]


@pytest.mark.parametrize("key", ["models.1.parameters.weight", "models[1].parameters.weight"])
def test_a_key_is_a_path_of_keys_and_indices(key: str) -> None:
    (found,) = changed(RECIPE, f"{key}=0.25")
    expected = yaml.safe_load(RECIPE)
    expected["models"][1]["parameters"]["weight"] = 0.25
    assert found == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.3", 0.3),
        ("[0, 0.5, 1]", [0, 0.5, 1]),
        ("{a: b=c}", {"a": "b=c"}),
        ("", None),
        ("true", True),
        ("'1'", "1"),
        ("a b", "a b"),
    ],
)
def test_a_value_is_yaml_and_missing_mappings_are_created(text: str, value: object) -> None:
    (found,) = changed(RECIPE, f"parameters.some.key={text}")
    assert isinstance(found, dict)
    assert found["parameters"] == {"some": {"key": value}}


def test_overrides_apply_in_order() -> None:
    (found,) = changed(RECIPE, "parameters={a: 1}", "parameters.b=2", "parameters.a=3")
    assert isinstance(found, dict)
    assert found["parameters"] == {"a": 3, "b": 2}


@pytest.mark.parametrize("key", ["first", "0"])
def test_in_several_stages_a_key_begins_with_the_stage(key: str) -> None:
    first, second = changed(STAGES, f"{key}.dtype=float32")
    assert isinstance(first, dict)
    assert first["dtype"] == "float32"
    assert second == {"merge_method": "passthrough", "models": [{"model": "first"}]}


@pytest.mark.parametrize(
    ("text", "override_text", "message"),
    [
        (RECIPE, "weight", "--set weight: expected KEY=VALUE, such as parameters.weight=0.3"),
        (RECIPE, "=1", "expected KEY=VALUE"),
        (RECIPE, "a..b=1", "expected KEY=VALUE"),
        (RECIPE, "models.2.model=c", "`models` is a list, whose indices are 0 to 1, got '2'"),
        (RECIPE, "models.weight=1", "`models` is a list, whose indices are 0 to 1, got 'weight'"),
        (RECIPE, "merge_method.x=1", "`merge_method` is 'linear', which has no entry 'x'"),
        (RECIPE, "models.0.parameters.0=1", r"`models\[0\].parameters` is not a list; its keys are weight"),
        (RECIPE, "models=[1,", r"--set models=\[1,: .*not valid YAML"),
        (RECIPE, "models=--- 1\n--- 2", "several YAML documents"),
        (STAGES, "dtype=float32", "the recipe has 2 stages: begin the key with one of first, 1"),
        (STAGES, "first=1", "expected a key of the stage"),
    ],
)
def test_an_error_names_the_override(text: str, override_text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        changed(text, override_text)
    assert f"--set {override_text}" in str(raised.value)


def test_an_empty_recipe_has_nothing_to_change() -> None:
    with pytest.raises(RecipeError, match="the recipe is empty"):
        changed("", "dtype=float32")


def test_the_text_of_the_recipe_is_the_changed_one(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(RECIPE)
    methods = merge_methods()
    loaded = load_recipe(path, methods=methods, overrides=["models.0.parameters.weight=0.3"])
    (found,) = changed(RECIPE, "models.0.parameters.weight=0.3")
    assert yaml.safe_load(loaded.text) == found
    assert loaded.text == uniform_layout(loaded.text)
    again = load_recipe([yaml.safe_load(loaded.text)], methods=methods)
    assert again.stages == loaded.stages
    assert load_recipe(path, methods=methods).text == RECIPE


def test_a_mistake_in_a_value_names_its_key(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(RECIPE)
    with pytest.raises(RecipeError, match=r"models\[0\]\.parameters\.weight: .*weight must be a finite number"):
        load_recipe(path, methods=merge_methods(), overrides=["models.0.parameters.weight=heavy"])
