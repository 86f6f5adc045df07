"""Published recipes on small models of their families: their values, their warnings, or their rejection.

`tests.support.published.table` has what is expected of each.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import MergeloomError
from tests.support.outputs import read_model
from tests.support.published.compare import compare
from tests.support.published.evaluate import evaluate
from tests.support.published.library import Library, values
from tests.support.published.other_families import FAMILIES
from tests.support.published.table import CASES, LONG, RECIPES, Case

OPTIONS = Options(device="cpu", threads=1, max_ram=4 << 30)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The models that the recipes name."""
    return Library(tmp_path_factory.mktemp("published"))


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty recipe, in the current directory."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path / "models")
    return tmp_path / "recipe.yml"


def unexpected(warnings: tuple[str, ...], wanted: tuple[tuple[str, ...], ...]) -> list[str]:
    """The warnings that none of the expected ones describes, and the words of those that are missing."""
    missing = list(wanted)
    found = []
    for warning in warnings:
        match = next((words for words in missing if all(word in warning for word in words)), None)
        if match is None:
            found.append(warning)
        else:
            missing.remove(match)
    return [*found, *(f"missing: {words}" for words in missing)]


def test_every_recipe_has_a_case() -> None:
    assert {case.file for case in CASES} == set(RECIPES.glob("*.yml"))
    assert len({case.file for case in CASES}) == 72


def check(case: Case, library: Library, recipe: Path) -> None:
    """Merge, and compare the values with the reference's and the warnings with the expected ones."""
    recipe.write_text(case.text)
    paths = library.link(case, Path())
    out = recipe.parent / "out"
    result = merge(recipe, out, OPTIONS)
    compare(read_model(out), evaluate(case.text, lambda name: values(paths, name), FAMILIES[case.family].stack))
    assert unexpected(result.plan.warnings, case.warnings) == []


def test_a_single_wrong_value_is_found(library: Library, recipe: Path) -> None:
    (case,) = (case for case in CASES if case.recipe == "109")
    paths = library.link(case, Path())
    recipe.write_text(case.text)
    merge(recipe, recipe.parent / "out", OPTIONS)
    found = read_model(recipe.parent / "out")
    wanted = evaluate(case.text, lambda name: values(paths, name), FAMILIES[case.family].stack)
    other_seed = evaluate(case.text, lambda name: values(paths, name), FAMILIES[case.family].stack, seed=1)
    assert compare(found, wanted).ulp < 1
    with pytest.raises(AssertionError, match="values differ"):
        compare(found, other_seed)
    found["model.layers.31.mlp.up_proj.weight"].view(-1).view(torch.int16)[-1] += 2
    with pytest.raises(AssertionError, match=r"model.layers.31.mlp.up_proj.weight: 1 of 2048 values differ"):
        compare(found, wanted)


MERGED = [case for case in CASES if not case.rejected]


@pytest.mark.parametrize("case", [case for case in MERGED if case.recipe not in LONG], ids=str)
def test_a_recipe_has_the_reference_values_and_the_expected_warnings(
    case: Case, library: Library, recipe: Path
) -> None:
    check(case, library, recipe)


@pytest.mark.parametrize("case", [case for case in MERGED if case.recipe in LONG], ids=str)
def test_a_long_recipe_has_the_reference_values_and_the_expected_warnings(
    case: Case, library: Library, recipe: Path
) -> None:
    check(case, library, recipe)


@pytest.mark.parametrize("case", [case for case in CASES if case.rejected], ids=str)
def test_a_recipe_is_rejected_with_the_reason(case: Case, library: Library, recipe: Path) -> None:
    recipe.write_text(case.text)
    if case.family:
        library.link(case, Path())
    with pytest.raises(MergeloomError) as error:
        plan(recipe, OPTIONS)
    assert [word for word in case.rejected if word not in str(error.value)] == [], str(error.value)
