"""``--set KEY=VALUE``: changes of a recipe before it is validated."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mergeloom.engine.recipe.load import load_recipe
from mergeloom.engine.recipe.overrides import override, recipe_difference, uniform_layout
from mergeloom.engine.recipe.yaml import parse_yaml
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
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


SLICES = """\
merge_method: linear
slices:
- sources:
  - {model: a, layer_range: [0, 4], parameters: {weight: 1}}
  - {model: b, layer_range: [0, 4], parameters: {weight: 1}}
"""
LONG = "parameters={" + ", ".join(f"k{number}: 1" for number in range(40)) + "}"


@pytest.mark.parametrize(
    ("text", "overrides", "location", "message"),
    [
        (
            RECIPE,
            ["models.0.parameters.weight=heavy"],
            "r.yml with --set models.0.parameters.weight=heavy: models[0].parameters.weight",
            "linear, model a: weight must be a finite number, got 'heavy'",
        ),
        (RECIPE, ["dtype=flaot16"], "r.yml with --set dtype=flaot16: dtype", "unknown dtype 'flaot16'; did you mean"),
        (
            RECIPE,
            ["models=[{model: a, parameters: {weight: x}}]"],
            "r.yml with --set models=[{model: a, parameters: {weight: x}}]: models[0].parameters.weight",
            "linear, model a: weight must be",
        ),
        (RECIPE, ["models.1="], "r.yml with --set models.1=: models[1]", "expected a mapping with `model`, got noth"),
        (
            RECIPE,
            ["parameters={weight: x}", "parameters.weight=y"],
            "r.yml with --set parameters.weight=y: parameters.weight",
            "linear: weight must be a finite number, got 'y'",
        ),
        (
            SLICES,
            ["slices.0.sources.1.layer_range=[0, 3]"],
            "r.yml:3 with --set slices.0.sources.1.layer_range=[0, 3]: slices[0]",
            "all sources of a slice must have the same number of layers, got a [0, 4], b [0, 3]",
        ),
        (
            STAGES,
            ["first.dtype=x"],
            "r.yml with --set first.dtype=x: first.dtype",
            "unknown dtype 'x'; use one of",
        ),
        (
            RECIPE.replace("model: b", "model: 'b@@c'"),
            ["models.0.parameters.weight=1"],
            "r.yml:5: models[1].model",
            "'b@@c' has more than one @",
        ),
        (
            RECIPE,
            ["merge_method=slerp", "base_model=c"],
            "r.yml:2 with --set merge_method=slerp --set base_model=c: models",
            "slerp takes 1 model besides the base, got 2: a, b",
        ),
        (
            RECIPE.replace("linear", "model_stock\nbase_model: c"),
            ["base_model="],
            "r.yml:1 with --set base_model=: merge_method",
            "model_stock needs a `base_model`",
        ),
        (
            STAGES,
            ["first.merge_method=ties"],
            "r.yml with --set first.merge_method=ties: first.merge_method",
            "ties needs a `base_model` in addition to a",
        ),
        (
            "merge_method: linear\n",
            ["dtype=float32"],
            "r.yml:1: ",
            "missing key: one of `models`, `slices`, `modules` is required",
        ),
    ],
)  # fmt: skip
def test_a_mistake_names_the_override_that_it_comes_from(
    text: str, overrides: list[str], location: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yml").write_text(text)
    with pytest.raises(RecipeError) as raised:
        load_recipe("r.yml", methods=merge_methods(), overrides=overrides)
    assert str(raised.value).startswith(f"{location.removesuffix(': ')}: {message}")


def test_a_warning_names_the_override_that_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yml").write_text(RECIPE.replace("linear\n", "linear\nfirst: 1\n"))
    long = LONG.replace("parameters", "another")
    found = load_recipe("r.yml", methods=merge_methods(), overrides=["parameter.weight=1", long]).warnings
    assert [(str(each).partition(": unknown key")[0], each.line) for each in found] == [
        ("r.yml:2: first", 2),
        ("r.yml with --set parameter.weight=1: parameter", None),
        (f"r.yml with --set {long[:117]}...: another", None),
    ]


def test_a_warning_about_the_method_names_the_override_that_chose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yml").write_text(RECIPE)
    overrides = ["merge_method=model_stock", "base_model=c"]
    found = load_recipe("r.yml", methods=merge_methods(), overrides=overrides).warnings
    assert [(str(each).partition(", ignored")[0], each.line) for each in found] == [
        (
            f"r.yml:{line} with --set merge_method=model_stock: models[{number}].parameters.weight: model_stock has no "
            "such parameter",
            line,
        )
        for number, line in ((0, 4), (1, 6))
    ]


def test_a_mistake_that_the_models_show_names_the_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/base").mkdir(parents=True)
    Path("r.yml").write_text(RECIPE)
    changes = ("models.0.model=modles/base", "models.1={model: models/bsae, parameters: {weight: 1}}")
    with pytest.raises(RecipeError) as raised:
        plan("r.yml", Options(overrides=changes))
    assert str(raised.value).splitlines() == [
        f"r.yml with --set {change}: models[{number}]{key}: there is no directory {name} here; did you mean "
        f"`models/base`? (for a model of the Hub, write `{name}@main`)"
        for number, change, key, name in (
            (0, changes[0], ".model", "modles/base"),
            (1, changes[1], "", "models/bsae"),
        )
    ]


def test_a_difference_of_recipes_begins_with_what_it_says() -> None:
    old = "# soup.yml\nmerge_method: linear\n\nmodels: [{model: a}]\n"
    new = "merge_method: ties\nmodels: [{model: a}]  # one\n"
    assert recipe_difference(old, new).startswith(": -merge_method: linear | ")
    assert "# soup.yml" not in recipe_difference(old, new)
    assert recipe_difference("# one\na: 1\n", "# two\na: 1\n") == ": -# one | +# two"
    assert recipe_difference(old, old) == ""
